"""The OSM file of a cell: what is written comes back, what is broken is named."""
import copy, json, math
from pathlib import Path

import orjson, pytest
from hypothesis import given, settings, strategies as st

from imagesim.ard import Cell
from imagesim.element import (FORM, HEAD_BYTES, check_osm, element_fault, merge_elements, node_form, osm_path, osm_state, read_elements, relation_form,
    tag_counters, way_form, write_osm)
from imagesim.element import _all_fine
from imagesim.infra import CorruptError, InputError, MissingError

CELL = Cell(33, '031111123030')
META = dict(source='overpass', endpoint='https://overpass.example/api', data_timestamp='2024-05-01T00:00:00Z', fetched_at='2024-05-01T06:00:00Z', fingerprint='0123')

def sample():
    return dict(nodes=[node_form(1, 13.5, 45.1, dict(natural='tree'), 2, '2016-07-15T19:30:04Z'), node_form(2, 13.6, 45.1), node_form(3, 13.6, 45.2)],
        ways=[way_form(10, [1,2,3,1], [[13.5,45.1],[13.6,45.1],None,[13.5,45.1]], dict(building='yes'), 1), way_form(11, [1,2], [[13.5,45.1],[13.6,45.1]])],
        relations=[relation_form(20, [('way',10,'outer'),('node',1,''),('relation',5,'sub')], dict(type='site'), 4, '2020-01-01T00:00:00Z')])

def whole(**changed): return dict(quadkey=CELL.quadkey, meta={}, **sample()) | changed

def test_what_is_written_comes_back(tmp_path):
    path = osm_path(tmp_path, CELL)
    meta = write_osm(path, CELL, sample(), META)
    back = read_elements(path)
    assert {k:back[k] for k in FORM}==sample() and back['meta']==meta
    assert list(back)==['quadkey','meta','nodes','ways','relations']
    assert meta['counts']==dict(nodes=3, ways=2, relations=1) and meta['cell']==CELL.id and 'ODbL' in meta['attribution']

def test_bucket(bucket):
    path = osm_path(bucket, CELL)
    meta = write_osm(path, CELL, sample(), META)
    assert read_elements(path)['ways']==sample()['ways'] and osm_state(path)==meta|dict(quadkey=CELL.quadkey)
    with pytest.raises(MissingError): osm_state(osm_path(bucket, CELL.neighbours()['N']))

def test_the_form_is_kept_and_private_data_is_not(tmp_path):
    got = sample()
    for e in (e for v in got.values() for e in v): e.update(user='Jo', uid=7, changeset=9)
    got['nodes'] = got['nodes'][::-1]; got['nodes'][0]['lon'] = 13.600000004; got['nodes'][1]['tags'] = {}
    got['ways'][0]['geometry'][0] = [13.50000000001, 45.1]
    before = copy.deepcopy(got)
    write_osm(tmp_path/'x.json', CELL, got, META)
    assert got==before
    back = read_elements(tmp_path/'x.json')
    assert {k:back[k] for k in FORM}==sample()
    assert not any(w in (tmp_path/'x.json').read_text() for w in ('user','uid','changeset','Jo'))

def test_same_elements_same_bytes(tmp_path):
    got = sample()
    for name,els in (('a',got),('b',{k:v[::-1] for k,v in reversed(got.items())})): write_osm(tmp_path/name, CELL, els, META)
    assert (tmp_path/'a').read_bytes()==(tmp_path/'b').read_bytes()

HOSTILE = ['<img src=x onerror=alert(1)>', "'; DROP TABLE labels; --", '../../../etc/passwd', 'C:\\x\0y', '\u202egnp.exe', 'مرحبا שלום', '\x00\x01\x1b[31m\x7f', '\ud800', 'a\udfffb',
    '\U0001f3d4', 'x'*10_000, '', ' ', '{"a":1}', '%s%n', '${HOME}', '\r\n\t', '\u2028', '\ufeff', ']},"meta":{}', '","nodes":[']

def test_hostile_tags_survive_and_do_no_harm(tmp_path):
    got = sample()
    got['nodes'][0]['tags'] = {t or 'empty':t for t in HOSTILE}
    got['relations'][0]['members'][0]['role'] = HOSTILE[0]
    meta = write_osm(tmp_path/'x.json', CELL, got, META|dict(notes=HOSTILE[:8], extract=HOSTILE[-1]))
    back = read_elements(tmp_path/'x.json')
    assert {k:back[k] for k in FORM}==got
    state = osm_state(tmp_path/'x.json')
    assert state['counts']==meta['counts'] and state['extract']==HOSTILE[-1] and state['notes']==HOSTILE[:8]
    assert [p.name for p in tmp_path.iterdir()]==['x.json']
    assert tag_counters(back)[0][("'; DROP TABLE labels; --",)*2]==1

@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(st.characters(exclude_categories=[]), max_size=20), st.text(st.characters(exclude_categories=[]), max_size=40), min_size=1, max_size=5))
def test_any_text_survives(tags):
    import tempfile
    got = sample(); got['ways'][0]['tags'] = tags
    with tempfile.TemporaryDirectory() as d:
        write_osm(Path(d)/'x.json', CELL, got, META)
        assert read_elements(Path(d)/'x.json')['ways'][0]['tags']==tags

def spoil(kind, i=0, /, **changed):
    got = sample()
    got[kind][i] = {k:v for k,v in (got[kind][i]|changed).items() if v is not Ellipsis}
    return got

nan, inf = math.nan, math.inf
BROKEN = [
    (spoil('nodes', lat=...), 'node 1: has no lat'), (spoil('nodes', lon=nan), 'node 1: lon is nan'), (spoil('nodes', lon=inf), 'node 1: lon is inf'), (spoil('nodes', lon='13'), "node 1: lon is '13'"),
    (spoil('nodes', 1, lat=90.1), 'node 2: lat is 90.1, beyond 90'), (spoil('nodes', 1, lon=-181), 'node 2: lon is -181, beyond 180'), (spoil('nodes', 2, lat=None), 'node 3: lat is None'), (spoil('nodes', lat=True), 'node 1: lat is True'), (spoil('nodes', lat=10**400), 'node 1: lat is 1000'), (spoil('ways', 1, geometry=[[1,2],[10**400,2]]), 'way 11: lon is 1000'),
    (spoil('nodes', 1, id=...), 'node at position 1: has no id'), (spoil('nodes', id='1'), "node at position 0: id '1' is not a whole number"), (spoil('nodes', id=2), 'node 2: occurs twice'), (spoil('nodes', id=2**63), 'not a whole number'),
    (spoil('nodes', tags=['a']), 'node 1: tags is not an object'), (spoil('nodes', tags=None), 'node 1: tags is not an object'), (spoil('nodes', tags=dict(lanes=2)), "node 1: tag 'lanes' is 2, not text"), (spoil('nodes', tags={3:'x'}), 'node 1: tag 3'),
    (spoil('nodes', version='2'), "node 1: version '2'"), (spoil('nodes', timestamp=5), 'node 1: timestamp 5'),
    (spoil('ways', nodes=[1,2,3]), 'way 10: has 3 node ids and 4 positions'), (spoil('ways', geometry=...), 'way 10: has no geometry'), (spoil('ways', geometry=None), 'way 10: has 4 node ids and no positions'),
    (spoil('ways', 1, geometry=[[1,2],[1,2,3]]), 'way 11: position [1, 2, 3]'), (spoil('ways', 1, geometry=[[1,2],[1,nan]]), 'way 11: lat is nan'), (spoil('ways', 1, geometry=[[1,2],[1,95.]]), 'way 11: lat is 95.0'),
    (spoil('ways', 1, geometry=[[1,2],{'lat':1,'lon':2}]), 'way 11: position'), (spoil('ways', 1, nodes=[1,'2']), 'way 11: nodes is not a list of ids'), (spoil('ways', 1, id=10), 'way 10: occurs twice'),
    (spoil('relations', members={}), 'relation 20: members is not a list'), (spoil('relations', members=...), 'relation 20: has no members'), (spoil('relations', members=[dict(type='area',ref=1,role='')]), 'relation 20: member'),
    (spoil('relations', members=[dict(type='way',ref='1',role='')]), 'relation 20: member'), (spoil('relations', members=[dict(type='way',ref=1)]), 'relation 20: member'), (spoil('relations', members=[5]), 'relation 20: member'),
    (sample()|dict(nodes=[7]), 'node at position 0: is int, not an object'), (sample()|dict(ways={}), 'ways is not a list')]

@pytest.mark.parametrize('elements,why', BROKEN, ids=[w for _,w in BROKEN])
def test_what_is_broken_is_named(elements, why):
    with pytest.raises(CorruptError) as e: check_osm(whole(**elements), 'some/osm_data.json')
    assert str(e.value).startswith('some/osm_data.json: ') and why in str(e.value) and 'delete it and fetch the cell again (imagesim osm)' in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('elements,why', BROKEN, ids=[w for _,w in BROKEN])
def test_what_is_broken_is_not_written(tmp_path, elements, why):
    with pytest.raises(CorruptError): write_osm(tmp_path/'x.json', CELL, elements, META)
    assert not any(tmp_path.iterdir())

@pytest.mark.parametrize('data,why', [([], 'holds list'), (whole(quadkey='03'), "quadkey '03' is not that of a cell"), (whole(quadkey=5), 'quadkey 5'), (whole(meta=[]), 'meta is not an object'),
    ({k:v for k,v in whole().items() if k!='ways'}, "has no 'ways'"), ({k:v for k,v in whole().items() if k!='meta'}, "has no 'meta'")])
def test_a_file_without_its_frame(data, why):
    with pytest.raises(CorruptError, match='fetch the cell again') as e: check_osm(data, 'x.json')
    assert why in str(e.value)

def test_file_of_another_cell(tmp_path):
    path = osm_path(tmp_path, CELL.neighbours()['E'])
    write_osm(path, CELL, sample(), META)
    for f in (read_elements, osm_state):
        with pytest.raises(CorruptError, match=f'is of cell .*{CELL.quadkey}.*, not'): f(path)

@settings(max_examples=150, deadline=None)
@given(st.data())
def test_quick_and_thorough_check_agree(data):
    "The quick look at whole columns and the slow look at one element find the same files wrong"
    kind = data.draw(st.sampled_from([*FORM]))
    es = sample()[kind]
    odd = st.one_of(st.none(), st.booleans(), st.integers(-2**70, 2**70), st.floats(), st.text(max_size=3), st.just([]), st.just({}), st.just({'a':1}), st.just([[1.,2.]]), st.just([1,2]), st.just({'a':'b'}), st.just([None,None]))
    for _ in range(data.draw(st.integers(0,2))):
        i, k = data.draw(st.integers(0, len(es)-1)), data.draw(st.sampled_from(FORM[kind]))
        es[i][k] = data.draw(odd)
    ids = [e['id'] for e in es]
    slow = all(element_fault(kind, e) is None for e in es) and len({*map(repr,ids)})==len(ids)
    assert _quick(kind, es)==slow

def _quick(kind, es):
    try: return _all_fine(kind, es)
    except Exception as e: return f'{type(e).__name__}: {e}' # the quick look must not break either

@pytest.mark.parametrize('data', [b'', b'{', b'null', b'[]', b'\xff\xfe', b'{"quadkey":"031111123030","meta":{', b'{"nodes":[]}', b'<html>busy</html>', b'{"a":"\\ud800","b":'+b'['*100_000, b'{"quadkey":"031111123030","meta":{},"nodes":[{"id":1,"lon":NaN,"lat":1}],"ways":[],"relations":[]}'])
def test_files_that_are_none(tmp_path, data):
    (tmp_path/'x.json').write_bytes(data)
    with pytest.raises(CorruptError, match='x.json: .*fetch the cell again'): read_elements(tmp_path/'x.json')

@pytest.mark.parametrize('data', [b'', b'{', b'null', b'{"quadkey":"031111123030","meta":{', b'{"nodes":[]}', b'<html>', b'{"quadkey":"031111123030","meta":[]}', b'{"quadkey":"031111123030","meta":'+b'['*60_000, b'{"quadkey":"031111123030","meta":{},"nodes":[{"id":1'])
def test_state_of_files_that_are_none(tmp_path, data):
    (tmp_path/'x.json').write_bytes(data)
    with pytest.raises(CorruptError, match='x.json: .*fetch the cell again'): osm_state(tmp_path/'x.json')

def test_every_cut_is_noticed(tmp_path):
    write_osm(tmp_path/'x.json', CELL, sample(), META)
    data = (tmp_path/'x.json').read_bytes()
    for n in range(0, len(data.rstrip())):
        (tmp_path/'cut.json').write_bytes(data[:n])
        with pytest.raises(CorruptError): read_elements(tmp_path/'cut.json')

def test_state_reads_the_head_only(tmp_path):
    many = [node_form(i, 13.5, 45.1) for i in range(1, 20_001)]
    meta = write_osm(tmp_path/'x.json', CELL, dict(nodes=many, ways=[], relations=[]), META)
    with open(tmp_path/'x.json', 'r+b') as f: f.seek(HEAD_BYTES+10); f.write(b'garbage')
    assert osm_state(tmp_path/'x.json')==meta|dict(quadkey=CELL.quadkey)
    with pytest.raises(CorruptError): read_elements(tmp_path/'x.json')

def test_long_notes_stay_in_the_head(tmp_path):
    meta = write_osm(tmp_path/'x.json', CELL, sample(), META|dict(notes=['\x01'*5000]*3000))
    assert osm_state(tmp_path/'x.json')['counts']==meta['counts'] and 'more' in meta['notes'][-1]

@pytest.mark.parametrize('meta', [{}, dict(source='web')])
def test_source_is_asked_for(tmp_path, meta):
    with pytest.raises(InputError, match='overpass'): write_osm(tmp_path/'x.json', CELL, sample(), meta)

@settings(max_examples=100, deadline=None)
@given(st.lists(st.builds(lambda i,v,tags,gap: way_form(i, [1,2,3], [None if g else [float(k),1.] for k,g in enumerate(gap)], tags, v),
    st.integers(1,3), st.sampled_from([None,1,2]), st.dictionaries(st.sampled_from('ab'), st.sampled_from('xy')), st.tuples(*[st.booleans()]*3)), max_size=8), st.randoms())
def test_merge_does_not_depend_on_order(ways, random):
    before = copy.deepcopy(ways)
    parts = [dict(ways=[w]) for w in ways]
    a = merge_elements(parts)
    random.shuffle(parts)
    assert merge_elements(parts)==a and ways==before
    assert merge_elements([a,a])==a
    for w in a['ways']: assert w.get('version', 0)==max(x.get('version', 0) for x in ways if x['id']==w['id'])

def test_tag_counters():
    nodes, ways, relations = tag_counters(sample())
    assert (nodes, ways, relations)==({('natural','tree'):1}, {('building','yes'):1}, {('type','site'):1})
