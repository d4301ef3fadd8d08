"""The command as the shell runs it: what it prints, what it leaves, how it ends."""
import json, os, re, subprocess, sys
from pathlib import Path

import httpx, mercantile, pytest

import conftest

def one_error_line(p): return p.returncode==2 and len(p.stderr.strip().splitlines())==1 and p.stderr.startswith('imagesim: ')

def test_help_names_every_command(imagesim, here):
    p = imagesim('--help')
    assert p.returncode==0
    for name in 'init', 'doctor', 'sync', 'tiles', 'osm', 'chip', 'nodata', 'labels', 'dataset', 'train', 'evaluate', 'runs', 'encode', 'schema', 'search', 'mosaic', 'serve', 'synth', 'demo':
        assert re.search(rf'^  {name}\s+\w', p.stdout, re.M)
        h = here(name, '--help')
        assert h.returncode==0 and 'Usage: imagesim' in h.stdout and not re.search(r'\bTODO\b|None]', h.stdout)

@pytest.mark.parametrize('group,names', [('osm',['status']), ('labels',['build','why','stats']), ('dataset',['make','list','show','diff','verify','push','pull']), ('schema',['build','apply','list','show','verify','push','pull']), ('mosaic',['build'])])
def test_help_names_every_command_of_a_group(here, group, names):
    p = here(group, '--help')
    assert p.returncode==0
    for name in names:
        assert re.search(rf'^  {name}\s+\w', p.stdout, re.M)
        h = here(group, name, '--help')
        assert h.returncode==0 and f'Usage: imagesim {group} {name}' in h.stdout and not re.search(r'\bTODO\b|None]', h.stdout)

def test_wrong_words_end_with_2(imagesim):
    for args in ['chpi'], ['init', '--rot', 'x'], ['synth'], ['synth', '--root', 'x', '--size', '99']:
        p = imagesim(*args)
        assert p.returncode==2 and 'Traceback' not in p.stderr

def test_init_and_its_settings(imagesim, tmp_path):
    p = imagesim('init', '--root', 'data')
    assert p.returncode==0 and 'export IMAGESIM_DATA_ROOT=' in p.stdout and (tmp_path/'data/schemas').is_dir()
    assert imagesim('init', env=dict(IMAGESIM_DATA_ROOT=str(tmp_path/'other'))).returncode==0 and (tmp_path/'other/ard').is_dir()
    (tmp_path/'file').write_text('')
    assert one_error_line(imagesim('init', '--root', 'file'))

def test_doctor_finds_everything_here(imagesim, tmp_path):
    p = imagesim('doctor', env=dict(IMAGESIM_DATA_ROOT=str(tmp_path)))
    assert p.returncode==0 and p.stdout.rstrip().endswith('All right.') and 'BAD' not in p.stdout
    assert re.search(r'driver JPEG\s+read chips', p.stdout) and 'environment variable IMAGESIM_DATA_ROOT' in p.stdout

def test_doctor_says_what_is_missing(imagesim, tmp_path):
    (tmp_path/'sitecustomize.py').write_text("import importlib.metadata as m\nreal = m.version\ndef fake(n):\n    if n in ('rasterio','torch'): raise m.PackageNotFoundError(n)\n    return real(n)\nm.version = fake")
    p = imagesim('doctor', env=dict(PYTHONPATH=f'{tmp_path}{os.pathsep}{conftest.ROOT}'))
    assert p.returncode==1 and 'pip install rasterio' in p.stdout and "pip install 'imagesim[model]'" in p.stdout and 'Problems: rasterio' in p.stdout

def test_doctor_asks_the_bucket(imagesim, bucket):
    from imagesim.infra import write_bytes
    write_bytes(f'{bucket}/ard/33/x', b'')
    p = imagesim('doctor', '--bucket', env=dict(IMAGESIM_BUCKET=bucket))
    assert p.returncode==0 and re.search(rf'{bucket}\s+ard', p.stdout)
    p = imagesim('doctor', '--bucket', env=dict(IMAGESIM_BUCKET=bucket+'-not'))
    assert p.returncode==1 and 'IMAGESIM_BUCKET' in p.stdout

def test_sync_by_its_short_form(imagesim, bucket, tmp_path):
    from imagesim.infra import write_bytes
    write_bytes(f'{bucket}/ard/33/0313/a-visual.tif', b'tile')
    write_bytes(f'{bucket}/ard/33/0313/a-ms.tif', b'large')
    env = dict(IMAGESIM_BUCKET=bucket, IMAGESIM_DATA_ROOT=str(tmp_path/'data'))
    p = imagesim('sync', 'ard/33', '--only', 'visual', env=env)
    assert p.returncode==0 and '1 file done' in p.stdout and [f.name for f in (tmp_path/'data').rglob('*.*')]==['a-visual.tif']
    (tmp_path/'data/datasets').mkdir()
    (tmp_path/'data/datasets/x.json').write_text('{}')
    assert imagesim('sync', 'datasets', '--push', env=env).returncode==0
    from imagesim.infra import read_bytes
    assert read_bytes(f'{bucket}/datasets/x.json')==b'{}'

def test_tiles_of_what_is_no_delivery(imagesim, tmp_path):
    (tmp_path/'photos').mkdir()
    (tmp_path/'photos/me.jpg').write_bytes(b'')
    p = imagesim('tiles', '--ard-path', 'photos')
    assert one_error_line(p) and 'photos' in p.stderr
    assert one_error_line(imagesim('tiles', '--ard-path', 'nowhere'))

def test_tiles_of_the_real_tile(imagesim, shared, tmp_path):
    p = imagesim('tiles', '--ard-path', shared/'banepa/ard', '--out', 'tiles.parquet')
    assert p.returncode==0 and 'Z45-031331122210_A0A0000000000001' in p.stdout and (tmp_path/'tiles.parquet').stat().st_size>1000

def ask_the_server(folder, env):
    "`imagesim serve` shows what the demo made, and ends when it is told to"
    pytest.importorskip('fastapi')
    p = subprocess.Popen([sys.executable, '-m', 'imagesim.cli', 'serve', '--port', '0', '--schema', 'demo'], cwd=folder, env={**os.environ, 'PYTHONPATH':str(conftest.ROOT), **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        lines = [p.stdout.readline()]
        while lines[-1] and not lines[-1].startswith('open http'): lines.append(p.stdout.readline())
        url = re.match(r'open (http://127\.0\.0\.1:\d+/)', lines[-1])[1]
        get = lambda path: httpx.get(url+path, timeout=60)
        config = get('api/config').json()
        assert get('health').json()['status']=='ok' and config['schemas'][0]['name']=='demo' and len(config['dates'])==2
        lon, lat, _ = config['center']
        place = get(f'api/at?lon={lon}&lat={lat}').json()
        assert place['labels'] and len(place['chips'])==2
        found = httpx.post(url+'api/search', json=dict(chip=place['chips'][0]['chip'], k=5), timeout=60).json()
        assert len(found['features'])==5
        t = mercantile.tile(lon, lat, 16)
        assert get(f'tiles/16/{t.x}/{t.y}.webp').headers['content-type']=='image/webp'
    finally: p.terminate()
    out, err = p.communicate(timeout=60)
    assert p.returncode==0 and 'ended' in out and 'Traceback' not in err, err

@pytest.mark.timeout(900) # two demos and a score of commands
def test_demo_runs_and_finds_itself_done(imagesim, here, tmp_path):
    "and what it leaves can be asked by the commands"
    pytest.importorskip('torch')
    demo = lambda: imagesim('demo', '--root', 'demo', '--size', '4', '--epochs', '1', timeout=280)
    p = demo()
    assert p.returncode==0, p.stderr
    kinds = 'ard/**/*-visual.tif', 'osm_data.json', 'labels/**/*.parquet', 'manifest.json', 'models/**/weights.safetensors', 'embeddings/**/*.parquet', 'generations/*.json'
    made = lambda: {f:f.stat().st_mtime_ns for pattern in kinds for f in (tmp_path/'demo').rglob(pattern)}
    before = made()
    assert [f.name for f in before].count('osm_data.json')==1 and len(before)==9
    assert (tmp_path/'demo/tiles.parquet').is_file() and all((tmp_path/'demo'/n).stat().st_size>10_000 for n in ('labels.png','search.jpg'))
    again = demo()
    assert again.returncode==0 and made()==before
    env = dict(IMAGESIM_DATA_ROOT=str(tmp_path/'demo'))
    for args,says in {('runs',):'finished', ('evaluate','demo','--split','train'):'train: mAP', ('schema','list'):'main', ('schema','show','demo'):'collection main', ('schema','verify','demo'):' 0 failed',
                      ('search','--schema','demo','--classes','water','-k','3','--out','r.geojson','--sheet','r.png'):'written to r.png', ('encode','demo'):'2 skipped'}.items():
        p = here(*args, env=env)
        assert p.returncode==0 and says in p.stdout, (args, p.stdout, p.stderr)
    assert len(json.loads((tmp_path/'r.geojson').read_text())['features'])==3 and (tmp_path/'r.png').stat().st_size>10_000
    p = here('mosaic', 'build', env=env)
    assert p.returncode==0 and ': 0 squares done' in p.stdout, p.stdout # the demo has built it
    ask_the_server(tmp_path, env)
    for args in (('search','--schema','demo'), ('search','--schema','demo','--lonlat','here'), ('search','--schema','nothing','--classes','water'), ('encode','nothing'), ('encode','demo','--shard','4'),
                 ('train','nothing','--run','x'), ('train','demo','--run','../x'), ('train','demo','--run','x','--backbone','resnet51'), ('train','demo','--run','x','--set','lr'), ('evaluate','nothing'), ('schema','show','nothing')):
        assert one_error_line(p := here(*args, env=env)), (args, p.stderr)

def test_from_the_map_to_a_dataset(here, bucket, tmp_path):
    env = dict(IMAGESIM_DATA_ROOT=str(tmp_path/'data'), IMAGESIM_BUCKET=bucket)
    run = lambda *args: here(*args, env=env)
    assert run('synth', '--root', 'data', '--size', '4', '--dates', '1').returncode==0 and run('chip', '--virtual').returncode==0
    p = run('labels', 'build')
    assert p.returncode==1 and 'imagesim osm' in p.stdout and '1 failed' in p.stdout # nothing fetched yet, and that is what it says
    assert run('osm', '--source', 'data/osm/synthetic.osm.pbf').returncode==0
    p = run('labels', 'build')
    assert p.returncode==0 and '1 cell done' in p.stdout, p.stderr
    p = run('labels', 'why')
    assert p.returncode==0 and all(c in p.stdout for c in ('houses','railway','bare'))
    p = run('labels', 'stats', '--figure', 'labels.png')
    assert p.returncode==0 and 'forest' in p.stdout and (tmp_path/'labels.png').stat().st_size>10_000
    p = run('dataset', 'make', 'first', '--split', 'train=0.5', '--split', 'test=0.5', '--cap', 'forest=5')
    assert p.returncode==0 and 'made: ' in p.stdout, p.stderr
    assert 'was there already' in run('dataset', 'make', 'first', '--split', 'train=0.5', '--split', 'test=0.5', '--cap', 'forest=5').stdout
    assert run('dataset', 'make', 'second', '--split', 'train=0.5', '--split', 'test=0.5', '--keep-newer').returncode==0
    assert len(run('dataset', 'list').stdout.splitlines())==3
    assert run('dataset', 'show', 'first').returncode==0 and run('dataset', 'diff', 'first', 'second').returncode==0
    assert run('dataset', 'push', 'first').returncode==0
    p = run('dataset', 'pull', 'first', '--out', 'elsewhere')
    assert p.returncode==0 and len(list((tmp_path/'elsewhere').rglob('manifest.json')))==1
    next((tmp_path/'elsewhere').rglob('sparse.csv')).write_text('tampered')
    assert run('dataset', 'verify', 'first', '--out', 'elsewhere').returncode==1
    for args in ('make','../x'), ('make','x','--split','train'), ('show','nothing'):
        p = run('dataset', *args)
        assert one_error_line(p), (args, p.stderr)

def test_chip_and_nodata_as_the_users_spell_them(imagesim, tmp_path):
    assert imagesim('synth', '--root', 'data', '--size', '2', '--dates', '1').returncode==0
    p = imagesim('chip', '--ard-path', 'data/ard/33', '--zoom', '17', '--proc', '2', '--dest', 'data/chips/33')
    assert p.returncode==0 and '1 tile done' in p.stdout
    chips = sorted((tmp_path/'data/chips/33').glob('*.jpg'))
    assert chips and all(re.fullmatch(r'Z33-[0-3]{17}_\w+\.jpg', f.name) for f in chips)
    older = imagesim('--ard-path', 'data/ard/33', '--zoom', '17', '--dest', 'older/33', module='imagesim.chip')
    assert older.returncode==0 and [f.name for f in sorted((tmp_path/'older/33').glob('*.jpg'))]==[f.name for f in chips]
    assert all((tmp_path/'older/33'/f.name).read_bytes()==f.read_bytes() for f in chips)
    for name,words in {'a.json':['chip'], 'b.json':['nodata']}.items():
        p = imagesim(*words, '--filename', name, '--chip-dir', 'data/chips/33')
        assert p.returncode==0, p.stderr
    assert (tmp_path/'a.json').read_bytes()==(tmp_path/'b.json').read_bytes()
    index = json.loads((tmp_path/'a.json').read_text())
    assert sorted(index)==[f.name for f in chips] and set(index.values())<={'all data', 'partial data', 'no data'}
    assert one_error_line(imagesim('chip', '--filename', 'c.json')) and one_error_line(imagesim('chip', '--ard-path', 'nowhere', '--dest', 'x'))
