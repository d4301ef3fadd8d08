"""Verdicts: whole lines or nothing, whoever writes, whatever is in the file"""
import csv, io, json, os, resource, signal, subprocess, sys, time
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from conftest import ROOT
from imagesim.ard import Cell
from imagesim.infra import InputError, MissingError, StorageError
from imagesim.verdicts import FORMATS, VERDICTS, Verdict, VerdictStore, append_line, clean_text, make_verdict, write_verdicts

CHIPS = [f'{p.id}_103001009A624563.jpg' for p in Cell.parse('Z33-031111123030').children(17)[:40]]

@pytest.fixture
def store(tmp_path): return VerdictStore(tmp_path/'verdicts')

WRITER = '''
import sys
sys.path.insert(0, sys.argv[1])
from imagesim.verdicts import VerdictStore
s = VerdictStore(sys.argv[2])
print('go', flush=True)
for i in range(int(sys.argv[4])): s.add('land', 'main', sys.argv[3], 'yes', query=f'{sys.argv[5]} {i}', note='n'*400)
'''

def writers(folder, n, each, **kw): return [subprocess.Popen([sys.executable, '-c', WRITER, str(ROOT), str(folder), CHIPS[0], str(each), str(i)], stdout=subprocess.PIPE, text=True, **kw) for i in range(n)]

def test_four_processes_lose_nothing(store):
    for p in (ps := writers(store.folder, 4, 150)): assert p.wait(60)==0
    for p in ps: p.stdout.close()
    found = store.find('land', 'main')
    assert len(found)==600 and {v.query for v in found}=={f'{i} {j}' for i in range(4) for j in range(150)}
    assert all(json.loads(line) for line in Path(store.folder, 'land/main.jsonl').read_text().splitlines())

def test_writers_that_are_killed_leave_whole_lines_or_a_torn_one_that_is_passed_over(store):
    for round in range(3):
        ps = writers(store.folder, 2, 10_000)
        for p in ps: p.stdout.readline()
        time.sleep(.15)
        for p in ps: p.send_signal(signal.SIGKILL); p.wait(); p.stdout.close()
    n = len(store.find('land', 'main'))
    with open(Path(store.folder, 'land/main.jsonl'), 'ab') as f: f.write(b'{"id":"torn') # what a machine leaves that loses its power
    v = store.add('land', 'main', CHIPS[1], 'no', query='after')
    assert n>0 and store.find('land', 'main')[-1]==v and len(store.find('land', 'main'))==n+1 and VerdictStore(store.folder).find('land', 'main', query='after')==[v]

def test_a_full_disk_leaves_the_file_as_it_was(store):
    first = store.add('land', 'main', CHIPS[0], 'yes', query='a')
    path = Path(store.folder, 'land/main.jsonl')
    was = path.read_bytes()
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(was)+20, old[1]))
    try:
        with pytest.raises(StorageError, match='could not be written'): store.add('land', 'main', CHIPS[1], 'yes', query='b')
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, old); signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes()==was and store.find('land', 'main')==[first]

def test_another_process_sees_what_is_new_and_what_is_gone(store):
    reader = VerdictStore(store.folder)
    a = store.add('land', 'main', CHIPS[0], 'yes', query='q')
    assert reader.find('land', 'main')==[a]
    b = store.add('land', 'main', CHIPS[0], 'no', query='q')
    assert reader.find('land', 'main')==[b] and reader.examples('land', 'main', query='q')==([], [CHIPS[0]])
    reader.remove('land', 'main', b.id)
    assert store.find('land', 'main')==[] # what it had replaced stays replaced
    with pytest.raises(MissingError, match='taken back already'): store.remove('land', 'main', b.id)
    os.replace(Path(store.folder, 'land/main.jsonl'), Path(store.folder, 'land/old.jsonl'))
    assert reader.find('land', 'main')==[] and store.collections()==[('land','old')]
    c = store.add('land', 'main', CHIPS[2], 'yes', cls='water')
    assert reader.find('land', 'main')==[c]

@pytest.mark.parametrize('line', [b'', b'null', b'[]', b'{}', b'{"removed":5}', b'{"removed":"nobody"}', b'\xff\xfe', b'{"id":1}', b'{"id":"a","at":"","schema":"s","collection":"c","chip":"x","verdict":"maybe"}', b'{"id":"a","at":"","schema":"s","collection":"c","chip":"x","verdict":"yes","note":5}', b'['*10_000])
def test_lines_that_are_no_verdict_are_passed_over(store, line):
    a = store.add('land', 'main', CHIPS[0], 'yes', query='q')
    append_line(f'{store.folder}/land/main.jsonl', line)
    b = store.add('land', 'main', CHIPS[1], 'no', query='q')
    assert VerdictStore(store.folder).find('land', 'main')==[a,b]==store.find('land', 'main')

@pytest.mark.parametrize('args', [('../x','main'), ('land','../x'), ('land','a/b'), ('','main'), ('land','x'*65), ('.hidden','main')])
def test_names_never_leave_the_folder(store, args):
    with pytest.raises(InputError): store.add(*args, CHIPS[0], 'yes', query='q')
    with pytest.raises(InputError): store.find(*args)

@pytest.mark.parametrize('chip', ['../../etc/passwd', 'a/'+CHIPS[0], CHIPS[0].replace('Z33','Z99'), 'x', '', CHIPS[0]+'/..', None, 5])
def test_only_chips_are_judged(store, chip):
    with pytest.raises(InputError): store.add('land', 'main', chip, 'yes', query='q')

def test_verdicts_are_not_kept_in_a_bucket():
    with pytest.raises(InputError, match='local folder'): VerdictStore('s3://bucket/verdicts')

@given(st.text(max_size=300))
@settings(max_examples=200, deadline=None)
def test_text_comes_out_clean_or_not_at_all(text):
    try: out = clean_text(text, 'query')
    except InputError: assert len(' '.join(text.split()))>200; return
    assert out is None or out==clean_text(out, 'query') and out==out.strip() and out.isprintable() is not None and not set(out)&set('\n\r\t\0\x1b\u2028\u2029') and out.encode()

@given(st.lists(st.tuples(st.sampled_from(CHIPS), st.sampled_from(VERDICTS), st.text(st.characters(exclude_categories=['Cs']), min_size=1, max_size=60), st.one_of(st.none(), st.text(st.characters(exclude_categories=['Cs']), max_size=60))), max_size=12))
@settings(max_examples=60, deadline=None)
def test_every_form_holds_what_was_said(rows):
    vs = []
    for chip,said,query,note in rows:
        try: vs.append(make_verdict('land', 'main', chip, said, query=query, note=note))
        except InputError: assert clean_text(query, 'query') is None
    assert [Verdict(**{('cls' if k=='class' else k):v for k,v in json.loads(line).items()}) for line in write_verdicts(vs, 'jsonl').decode().split('\n') if line]==vs
    g = json.loads(write_verdicts(vs))
    assert [f['properties']['query'] for f in g['features']]==[v.query for v in vs] and [f['id'] for f in g['features']]==[v.id for v in vs]
    table = list(csv.DictReader(io.StringIO(write_verdicts(vs, 'csv').decode(), newline='')))
    assert [(r['chip'], r['verdict']) for r in table]==[(v.chip, v.verdict) for v in vs]
    for r,v in zip(table, vs):
        assert r['query'] in (v.query, "'"+v.query) and r['query'][0] not in '=+-@'
        lon, lat = Cell.parse(v.chip.partition('_')[0]).lonlat
        assert float(r['lon'])==pytest.approx(lon, abs=1e-6) and float(r['lat'])==pytest.approx(lat, abs=1e-6)

def test_export(store, tmp_path):
    for c in CHIPS[:5]: store.add('land', 'main', c, 'yes', query='ponds')
    store.add('land', 'main', CHIPS[0], 'no', cls='water')
    for f in FORMATS: assert store.export(tmp_path/f'x.{f}', 'land', 'main', query='ponds')==5
    with pytest.raises(InputError, match='geojson'): store.export(tmp_path/'x.xlsx', 'land', 'main')
    assert sorted(p.name for p in tmp_path.glob('x.*'))==['x.csv','x.geojson','x.jsonl']
