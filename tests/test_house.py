"""The rules of the house: which way imports go, what a floor may use, what no module does."""
import ast, configparser, os, re, subprocess, sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from conftest import ROOT

FLOORS = [['infra'], ['ard', 'read'], ['land', 'paint', 'synth', 'element', 'feature', 'overpass', 'extract', 'osm', 'chip', 'nodata'],
          ['classes', 'labels', 'explore', 'offset', 'encoding', 'split', 'dataset'], ['loader', 'loss', 'model', 'augment', 'metrics', 'runs', 'train', 'bundle', 'compress', 'encode'],
          ['nearest', 'similarity', 'search', 'retrieval', 'audit', 'change', 'mosaic', 'verdicts'], ['guard', 'service', 'serve', 'cli']]
FLOOR = {name:i for i,names in enumerate(FLOORS) for name in names}
MODULES = sorted(p for p in (ROOT/'imagesim').glob('*.py') if not p.name.startswith('_'))

def imported(path):
    "Yield the modules that a file imports, anywhere in it but in what `python -m` runs"
    tree = ast.parse(path.read_text(encoding='utf-8'))
    tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and '__main__' in ast.dump(n.test))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        if isinstance(node, ast.ImportFrom): yield ('imagesim.' if node.level else '')+(node.module or '')

def our_imports(path): return [m.split('.')[1] for m in imported(path) if re.match(r'imagesim\.\w', m)]

@pytest.mark.parametrize('path', MODULES, ids=lambda p: p.stem)
def test_imports_only_go_down(path):
    assert path.stem in FLOOR, f'{path.stem} has no floor: give it one here, in CONTRIBUTING and in the sidebar'
    ours = our_imports(path)
    assert not [m for m in ours if FLOOR[m]>FLOOR[path.stem] or m==path.stem]

def test_modules_of_a_floor_do_not_import_in_a_circle():
    graph = {p.stem:set(our_imports(p)) for p in MODULES}
    done = set()
    while ready := {k for k,v in graph.items() if k not in done and v<=done}: done |= ready
    assert done==set(graph)

@pytest.mark.parametrize('path', MODULES, ids=lambda p: p.stem)
def test_nothing_unpickles_from_disk(path):
    text = path.read_text(encoding='utf-8')
    assert not re.search(r'\bpickle\.load|\bjoblib\.load|allow_pickle=True|weights_only=False|yaml\.load\(', text)

def test_the_lower_floors_import_without_raster_and_geometry_libraries():
    blocked = 'rasterio', 'geopandas', 'shapely', 'pyproj', 'maxar_ard_grid', 'osmium', 'fastapi', 'torch', 'matplotlib', 'seaborn', 'scipy', 'sklearn', 'duckdb'
    names = [p.stem for p in MODULES if FLOOR[p.stem]<2]
    code = f'import sys\nfor m in {blocked!r}: sys.modules[m] = None\n' + '\n'.join(f'import imagesim.{n}' for n in names)
    p = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert p.returncode==0, p.stderr

@pytest.mark.skipif(find_spec('torch') is None, reason='torch is not installed')
def test_floor_4_runs_on_a_bare_gpu_machine():
    "Neither raster, geometry, tables nor web: what a machine with torch and lightning has"
    blocked = 'rasterio', 'geopandas', 'shapely', 'pyproj', 'duckdb', 'maxar_ard_grid', 'osmium', 'overpy', 'faiss', 'fastapi', 's3fs', 'mercantile', 'httpx'
    names = [p.stem for p in MODULES if FLOOR[p.stem]==4]
    assert len(names)>=9
    code = f'import sys\nfor m in {blocked!r}: sys.modules[m] = None\n' + '\n'.join(f'import imagesim.{n}' for n in names)
    p = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert p.returncode==0, p.stderr
    for name in names: assert not {m.split('.')[0] for m in imported(ROOT/'imagesim'/f'{name}.py')}&{'rasterio', 'geopandas', 'shapely', 'pyproj', 'duckdb', 'fastapi', 'starlette'}

def test_the_command_starts_without_heavy_imports():
    code = "import sys, imagesim.cli\nprint(*[m for m in ('torch','rasterio','geopandas','matplotlib','duckdb','pandas') if m in sys.modules])"
    p = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert p.stdout.split()==[], p.stderr

def test_lock_covers_what_settings_ask_for_and_names_no_address():
    ini = configparser.ConfigParser(delimiters=['='], interpolation=None)
    ini.read(ROOT/'settings.ini')
    wanted = {re.split(r'[<>=\[]', r)[0].lower().replace('_','-') for k,v in ini['DEFAULT'].items() if k.endswith('requirements') for r in v.split()}
    lock = (ROOT/'requirements.lock').read_text()
    assert not wanted-set(re.findall(r'^([\w.-]+?)(?:\[[^]]*\])?==', lock, re.M)) and '://' not in lock

def test_both_quarto_files_are_one(): assert (ROOT/'nbs/_quarto.yml').resolve()==ROOT/'_quarto.yml'

def test_readme_renders_links_from_the_top():
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    for target in re.findall(r'\]\((?!https?:|#)([^)\s]+)\)', text): assert (ROOT/target.split('#')[0]).exists(), target
    assert 'make demo' in text and 'make test' in text
