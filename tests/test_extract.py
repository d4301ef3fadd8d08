"""Cells out of OSM extracts: complete against osmium's own reading, on real files, invented ones, damaged ones, and after a kill."""
import gzip, json, os, signal, subprocess, sys, time
from collections import Counter
from pathlib import Path

import numpy as np, orjson, osmium, pytest, shapely
from hypothesis import HealthCheck, given, settings, strategies as st
from osmium.osm import mutable
from pyproj import Transformer

from imagesim.ard import Cell, covering_cells
from imagesim.extract import MISSING, CellCandidates, Extract, extract_cells
from imagesim.feature import cell_elements, sea_polygon
from imagesim.infra import CorruptError, ImagesimError, InputError, MissingError, StorageError

KINDS = 'nodes', 'ways', 'relations'

def read_all(path):
    "Every element of an extract in our forms, by osmium, one by one: slow, and nothing in common with what is tested"
    out, at = {k:[] for k in KINDS}, {}
    for o in osmium.FileProcessor(str(path)):
        tail = {'tags':dict(o.tags)} if o.tags else {}
        if o.version: tail['version'] = o.version
        if o.timestamp.timestamp()>0: tail['timestamp'] = o.timestamp.strftime('%Y-%m-%dT%H:%M:%SZ')
        if o.is_node():
            if o.location.valid():
                at[o.id] = [round(o.lon,7), round(o.lat,7)]
                out['nodes'].append({'id':o.id, 'lon':at[o.id][0], 'lat':at[o.id][1], **tail})
        elif o.is_way():
            refs = [n.ref for n in o.nodes]
            out['ways'].append({'id':o.id, 'nodes':refs, 'geometry':[at.get(r) for r in refs], **tail})
        else: out['relations'].append({'id':o.id, 'members':[{'type':{'n':'node','w':'way','r':'relation'}[m.type], 'ref':m.ref, 'role':m.role} for m in o.members], **tail})
    return out

def same(a, b):
    "Equal, element by element, and say which is not"
    for k in KINDS:
        ia, ib = {e['id']:e for e in a[k]}, {e['id']:e for e in b[k]}
        assert ia.keys()==ib.keys(), f'{k}: {sorted(ia.keys()^ib.keys())[:5]}'
        for i in ia: assert ia[i]==ib[i], (ia[i], ib[i])
        assert len(ia)==len(a[k]) and len(ib)==len(b[k])
    return True

def is_superset(candidates, needed):
    for k in KINDS:
        have = {e['id']:e for e in candidates[k]}
        for e in needed[k]: assert have.get(e['id'])==e, (k, e, have.get(e['id']))

def write(path, nodes=(), ways=(), relations=(), box=None, order='nwr'):
    "Write an extract: nodes as (id, lon, lat, tags), ways as (id, refs, tags), relations as (id, members, tags)"
    header = osmium.io.Header()
    if box: header.add_box(osmium.osm.Box(*box))
    facts = dict(version=1, timestamp='2020-01-02T03:04:05Z')
    with osmium.SimpleWriter(osmium.io.File(str(path)), 2**20, header) as w:
        for k in order:
            for o in sorted(nodes) if k=='n' else sorted(ways) if k=='w' else sorted(relations):
                if k=='n': w.add_node(mutable.Node(id=o[0], location=(o[1],o[2]) if o[1] is not None else None, tags=o[3], **facts))
                elif k=='w': w.add_way(mutable.Way(id=o[0], nodes=o[1], tags=o[2], **facts))
                else: w.add_relation(mutable.Relation(id=o[0], members=o[1], tags=o[2], **facts))
    return path

# --- real extracts -------------------------------------------------------------------------------------------------------

REAL = {'monaco-2021':(25423,4106,243), 'helsinki-2019':(24260,5130,620), 'liechtenstein-2022':(306700,32585,890)}

@pytest.fixture(scope='module', params=REAL)
def real(request, shared, tmp_path_factory):
    path = shared/'osm'/f'{request.param}.osm.pbf'
    e = Extract(path)
    return path, read_all(path), extract_cells(path, covering_cells(shapely.box(*e.bounds)), tmp_path_factory.mktemp('spool'))

def brought_along(by_id):
    "Ways that a cell may have for no other reason than to tell where the sea is, or that a multipolygon brought along"
    brought = {m['ref'] for r in by_id['relations'].values() if r.get('tags',{}).get('type')=='multipolygon' for m in r['members']}
    return brought | {w['id'] for w in by_id['ways'].values() if w.get('tags',{}).get('natural')=='coastline'}

def boxes_of(cells): return [(c, c.buffered(156.25)) for c in cells]

def in_boxes(lonlat, cells):
    "Which positions lie in a box of any of the cells"
    lonlat, out = np.array(lonlat), np.zeros(len(lonlat), bool)
    for c,b in boxes_of(cells):
        near = np.flatnonzero((np.abs(lonlat-c.lonlat)<(.1,.1)).all(1)) # far more than half a cell
        x,y = Transformer.from_crs(4326, c.epsg, always_xy=True).transform(*lonlat[near].T)
        out[near] |= (x>=b.left)&(x<=b.right)&(y>=b.bottom)&(y<=b.top)
    return out

def test_counts_of_real_extracts(real):
    path, everything, found = real
    f = found.facts
    assert (f['nodes'],f['ways'],f['relations'])==REAL[path.name.removesuffix('.osm.pbf')]
    assert f['relations']==len(everything['relations']) and f['unplaced_ways']==sum(not any(w['geometry']) for w in everything['ways'])

def test_real_extracts_reconcile(real):
    "The union of all cells is the extract, less what can be named"
    path, everything, found = real
    union = {k:set() for k in KINDS}
    for c in found:
        got = cell_elements(found[c], c)
        for k in KINDS: union[k] |= {e['id'] for e in got[k]}
    by_id = {k:{e['id']:e for e in everything[k]} for k in KINDS}
    for k in KINDS: assert union[k]<=by_id[k].keys()
    # nodes: those outside all boxes, and no others
    ok = in_boxes([(n['lon'],n['lat']) for n in everything['nodes']], found)
    assert union['nodes']=={n['id'] for n,i in zip(everything['nodes'],ok) if i}
    # ways: those without a position, those that meet no box (the extract keeps ways whole, beyond its bounds)
    outside = by_id['ways'].keys()-union['ways']
    places = [p for w in outside for p in by_id['ways'][w]['geometry'] if p]
    assert not places or not in_boxes(places, found).any()
    # relations: nothing of theirs that is in the extract is in a box
    members = lambda r, kind: {m['ref'] for m in r['members'] if m['type']==kind}
    elsewhere = brought_along(by_id)
    for i in by_id['relations'].keys()-union['relations']:
        r = by_id['relations'][i]
        assert not members(r,'node') & union['nodes']
        assert not members(r,'way') & union['ways'] - elsewhere
    assert all(union.values())

def test_multipolygons(real):
    path, everything, found = real
    relations = {r['id']:r for c in found for r in found[c]['relations']}
    multi = {i for i,r in relations.items() if r.get('tags',{}).get('type')=='multipolygon'}
    raw = {r['id'] for r in everything['relations'] if r.get('tags',{}).get('type')=='multipolygon'}
    if 'liechtenstein' in path.name: assert len(raw)==216 and multi==raw
    # wherever one is kept, so are all its member ways that the extract has
    ways = {w['id'] for w in everything['ways']}
    for c in found:
        got = found[c]
        have = {w['id'] for w in got['ways']}
        for r in got['relations']:
            if r['id'] in multi: assert {m['ref'] for m in r['members'] if m['type']=='way'}&ways <= have

def test_same_choice_as_from_everything(real):
    "cell_elements can't tell our candidates from the whole extract"
    path, everything, found = real
    cells = list(found)
    for c in cells if len(everything['nodes'])<100_000 else cells[9:10]: assert same(cell_elements(found[c], c), cell_elements(everything, c))

def test_ways_without_nodes(shared, tmp_path):
    path = shared/'osm/helsinki-2019.osm.pbf'
    cells = covering_cells(shapely.box(*Extract(path).bounds))
    found = extract_cells(path, cells, tmp_path)
    gaps = sum(p is None for c in found for w in found[c]['ways'] for p in w['geometry'])
    assert gaps>0
    assert all(len(w['nodes'])==len(w['geometry']) for c in found for w in found[c]['ways'])

def test_positions_read_as_overpass_writes_them(real):
    "A coordinate is the double nearest to its seven decimals"
    path, everything, found = real
    c = next(iter(found))
    for n in found[c]['nodes'][:3000]: assert n['lon']==float(f"{n['lon']:.7f}") and n['lat']==float(f"{n['lat']:.7f}")

def test_small_memory_gives_the_same(real, tmp_path):
    path, _, found = real
    again = extract_cells(path, found.cells, tmp_path, memory_mb=0)
    for c in list(found)[:6]: assert found[c]==again[c]

def copy_with_box(path, to, box):
    header = osmium.io.Header(); header.add_box(osmium.osm.Box(*box))
    with osmium.SimpleWriter(osmium.io.File(str(to)), 2**20, header) as w:
        for o in osmium.FileProcessor(str(path)): w.add(o)
    return to

def test_open_sea(shared, tmp_path):
    "A cell all sea has nothing but the nearest coastline, and that says sea"
    path = copy_with_box(shared/'osm/monaco-2021.osm.pbf', tmp_path/'m.osm.pbf', (7.2,43.5,7.6,43.8))
    sea = Cell.at(7.47, 43.66)
    found = extract_cells(path, [sea, Cell.at(7.42,43.73)], tmp_path/'s')
    got = cell_elements(found[sea], sea)
    assert not got['nodes'] and got['ways'] and all(w['tags']['natural']=='coastline' for w in got['ways'])
    assert not found.failures() and found.notes(sea)==[]
    assert sea_polygon(got, sea).area>.99*sea.geometry().area

def test_uncovered_is_not_empty(shared, tmp_path):
    path = shared/'osm/monaco-2021.osm.pbf'
    far, here = Cell.at(11.,48.), Cell.at(7.42,43.73)
    found = extract_cells(path, [far,here], tmp_path)
    assert list(found)==[here] and far not in found
    assert 'monaco-2021.osm.pbf does not cover this cell' in found.failures()[far] and '\n' not in found.failures()[far]
    with pytest.raises(MissingError, match='does not cover'): found[far]
    assert 'of this cell' in found.notes(here)[0]

# --- the synthetic delivery ------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def delivery(tmp_path_factory):
    from imagesim.synth import make_delivery
    return make_delivery(tmp_path_factory.mktemp('delivery'), size=4, dates=1, seed=3)

def from_overpass(path):
    "Candidates as Overpass would deliver them"
    elements = json.loads(Path(path).read_text())['elements']
    at = {e['id']:[e['lon'],e['lat']] for e in elements if e['type']=='node'}
    out = {k:[] for k in KINDS}
    for e in elements:
        tail = {k:e[k] for k in ('tags','version','timestamp') if k in e}
        if e['type']=='node': out['nodes'].append({'id':e['id'], 'lon':e['lon'], 'lat':e['lat'], **tail})
        elif e['type']=='way': out['ways'].append({'id':e['id'], 'nodes':e['nodes'], 'geometry':[at.get(r) for r in e['nodes']], **tail})
        else: out['relations'].append({'id':e['id'], 'members':e['members'], **tail})
    return out

def test_extract_equals_overpass(delivery, tmp_path):
    other = from_overpass(delivery.overpass)
    lonlat = np.array([(n['lon'],n['lat']) for n in other['nodes']])
    cells = covering_cells(shapely.box(*lonlat.min(0), *lonlat.max(0)))
    found = extract_cells(delivery.pbf, cells, tmp_path)
    assert len(found)>1
    for c in found: assert same(cell_elements(found[c], c), cell_elements(other, c))
    assert found.data_timestamp==json.loads(Path(delivery.overpass).read_text())['osm3s']['timestamp_osm_base']

@pytest.mark.parametrize('form', ['osm','osm.bz2','osm.gz','opl','osm.pbf,pbf_dense_nodes=false','osm.pbf,pbf_compression=none','osm.pbf,add_metadata=false','osm.pbf,pbf_compression=lz4'])
def test_other_formats(delivery, tmp_path, form):
    kind, _, options = form.partition(',')
    path = tmp_path/f'x.{kind}'
    writer = osmium.WriteHandler(osmium.io.File(str(path), 'pbf,'+options if options else ''))
    osmium.apply(osmium.io.Reader(str(delivery.pbf)), writer); writer.close()
    cells = [Cell.at(13.53,45.03)]
    cells += list(cells[0].neighbours().values())
    expected = read_all(path)
    found = extract_cells(path, cells, tmp_path/'s')
    assert found and ('version' in expected['nodes'][0])==('metadata' not in form)
    for c in found: assert same(cell_elements(found[c], c), cell_elements(expected, c))

# --- one case each ---------------------------------------------------------------------------------------------------------

CELL = Cell.at(13.53, 45.03)
TO = Transformer.from_crs(CELL.epsg, 4326, always_xy=True)

def at(dx, dy):
    "Longitude and latitude of a place, in metres from the cell's lower left corner"
    lon, lat = TO.transform(CELL.bounds.left+dx, CELL.bounds.bottom+dy)
    return round(lon,7), round(lat,7)

def nodes(*places, first=1): return [(first+i, *at(*p), {}) for i,p in enumerate(places)]

def chosen(path, tmp_path, cell=CELL):
    found = extract_cells(path, [cell], tmp_path/'s')
    got, everything = cell_elements(found[cell], cell), read_all(path)
    is_superset(found[cell], got)
    assert same(got, cell_elements(everything, cell))
    return {k:[e['id'] for e in got[k]] for k in KINDS}

def test_way_across_a_corner(tmp_path):
    "Its ends are not in the box, 200 m inside its corner it passes; the other way just misses it"
    path = write(tmp_path/'a.osm.pbf', nodes((-1000,800),(800,-1000), (-1000,600),(600,-1000)), [(1,[1,2],{'highway':'track'}), (2,[3,4],{'highway':'track'})])
    assert chosen(path, tmp_path)==dict(nodes=[], ways=[1], relations=[])

def test_way_with_far_ends(tmp_path):
    "600 km of line with two nodes: straight in UTM, not in degrees"
    path = write(tmp_path/'a.osm.pbf', nodes((-300_000,2500),(300_000,2500)), [(1,[1,2],{'route':'ferry'})])
    assert chosen(path, tmp_path)['ways']==[1]

RING = (-3000,-3000),(8000,-3000),(8000,8000),(-3000,8000)

def test_enclosing_forest_as_a_way(tmp_path):
    path = write(tmp_path/'a.osm.pbf', nodes(*RING), [(1,[1,2,3,4,1],{'landuse':'forest'}), (2,[1,2,3,4,1],{'highway':'track'})])
    assert chosen(path, tmp_path)==dict(nodes=[], ways=[1], relations=[])

def test_enclosing_forest_as_a_multipolygon(tmp_path):
    "No member comes near the cell, and all are needed; a hole far away too"
    hole = (9000,9000),(9500,9000),(9500,9500)
    outer = (-3000,-3000),(12000,-3000),(12000,12000),(-3000,12000)
    path = write(tmp_path/'a.osm.pbf', nodes(*outer,*hole), [(1,[1,2,3],{}), (2,[3,4,1],{}), (3,[5,6,7,5],{}), (4,[2,3],{'highway':'track'})],
        [(1,[('w',1,'outer'),('w',2,'outer'),('w',3,'inner'),('w',77,'outer')][:3],{'type':'multipolygon','landuse':'forest'}),
         (2,[('w',1,'outer'),('w',2,'outer')],{'type':'boundary','boundary':'administrative'})])
    assert chosen(path, tmp_path)==dict(nodes=[], ways=[1,2,3], relations=[1])

def test_relations_list_members_but_are_not_followed(tmp_path):
    path = write(tmp_path/'a.osm.pbf', nodes((100,100),(90_000,90_000),(91_000,90_000)), [(1,[2,3],{'highway':'path'})],
        [(1,[('n',1,'stop'),('w',1,''),('r',9,'')],{'type':'route'}), (2,[('r',1,'')],{'type':'superroute'}), (3,[('w',1,'')],{'type':'route'})])
    assert chosen(path, tmp_path)==dict(nodes=[1], ways=[], relations=[1])
    r = extract_cells(path, [CELL], tmp_path/'s')[CELL]['relations'][0]
    assert r['members']==[{'type':'node','ref':1,'role':'stop'},{'type':'way','ref':1,'role':''},{'type':'relation','ref':9,'role':''}]

def test_members_of_a_multipolygon_that_touches_the_cell(tmp_path):
    "One member crosses the cell, the others lie far away: all come along"
    path = write(tmp_path/'a.osm.pbf', nodes((100,100),(60_000,100),(60_000,60_000),(100,60_000)), [(1,[1,2],{}), (2,[2,3],{}), (3,[3,4,1],{})],
        [(1,[('w',1,'outer'),('w',2,'outer'),('w',3,'outer')],{'type':'multipolygon','natural':'water'})])
    assert chosen(path, tmp_path)==dict(nodes=[1], ways=[1,2,3], relations=[1])

def test_nearest_coastline(tmp_path):
    places = nodes((-5000,2500),(-5000,9000), (-15_000,2500),(-15_000,9000), (-40_000,2500),(-40_000,9000))
    path = write(tmp_path/'a.osm.pbf', places, [(i+1,[2*i+1,2*i+2],{'natural':'coastline'}) for i in range(3)], box=(12,44,15,46))
    assert chosen(path, tmp_path)==dict(nodes=[], ways=[1], relations=[])
    assert {w['id'] for w in extract_cells(path, [CELL], tmp_path/'s')[CELL]['ways']}=={1,2}

def test_antimeridian(tmp_path):
    "A cell on both sides of 180 degrees"
    cell = Cell.at(179.999, -17.)
    b, to = cell.buffered(0), Transformer.from_crs(cell.epsg, 4326, always_xy=True)
    lon, lat = to.transform(np.linspace(b.left+10, b.right-10, 9), np.full(9, (b.bottom+b.top)/2))
    lon = (np.array(lon)+180)%360-180
    assert lon.min()<-179 and lon.max()>179
    path = write(tmp_path/'a.osm.pbf', [(i+1, round(float(x),7), round(float(y),7), {}) for i,(x,y) in enumerate(zip(lon,lat))], box=(-180,-20,180,-10))
    assert [n['id'] for n in extract_cells(path, [cell], tmp_path/'s')[cell]['nodes']]==list(range(1,10))

# --- invented extracts -----------------------------------------------------------------------------------------------------

# four cells round the corner of two zones: places near 12 degrees east belong to cells of both
CORNER = [c for c in covering_cells(shapely.box(11.95,47.98,12.05,48.03))]
place = st.one_of(st.tuples(st.integers(119_000_000,121_000_000), st.integers(479_500_000,480_500_000)),
                  st.tuples(st.integers(105_000_000,135_000_000), st.integers(470_000_000,490_000_000)))
tag_sets = st.sampled_from([{}, {'highway':'track'}, {'landuse':'forest'}, {'natural':'coastline'}, {'building':'yes','name':'Ä \u00df \U0001f333'}, {'natural':'water'}])
kinds_of_relation = st.sampled_from([{'type':'multipolygon','natural':'water'}, {'type':'multipolygon'}, {'type':'boundary','boundary':'x'}, {'type':'route'}, {'type':'multipolygon','boundary':'x'}, {}])

@st.composite
def extracts(draw):
    places = draw(st.lists(place, min_size=1, max_size=14))
    ids = draw(st.lists(st.integers(1,2**40), min_size=len(places), max_size=len(places), unique=True))
    ns = [(i, x/1e7, y/1e7, draw(tag_sets)) for i,(x,y) in zip(ids,places)]
    ref = st.sampled_from(ids+[2**41]) # one that the extract lacks
    ws = []
    for i in draw(st.lists(st.integers(1,10**9), max_size=7, unique=True)):
        refs = draw(st.lists(ref, max_size=6))
        ws.append((i, refs+refs[:1] if draw(st.booleans()) else refs, draw(tag_sets)))
    members = st.one_of(st.tuples(st.just('w'), st.sampled_from([w[0] for w in ws]+[10**9+1]), st.sampled_from(['outer','inner',''])),
                        st.tuples(st.just('n'), ref, st.just('')), st.tuples(st.just('r'), st.integers(1,9), st.just('x')))
    rs = [(i, draw(st.lists(members, max_size=5)), draw(kinds_of_relation)) for i in draw(st.lists(st.integers(1,9), max_size=4, unique=True))]
    return ns, ws, rs

def brute(everything, cell):
    "What a cell must have, written down once more without any haste: (nodes, ways, relations by a direct member)"
    b, to = cell.buffered(156.25), Transformer.from_crs(4326, cell.epsg, always_xy=True)
    square = shapely.box(*b)
    inside = lambda p: square.intersects(shapely.Point(to.transform(*p)))
    ns = {n['id'] for n in everything['nodes'] if inside((n['lon'],n['lat']))}
    ws = set()
    for w in everything['ways']:
        xy = [to.transform(*p) for p in w['geometry'] if p]
        if len(xy)==1 and inside(next(p for p in w['geometry'] if p)) or len(xy)>1 and shapely.LineString(xy).intersects(square): ws.add(w['id'])
    rs = {r['id'] for r in everything['relations'] if any(m['ref'] in (ns if m['type']=='node' else ws if m['type']=='way' else ()) for m in r['members'])}
    return ns, ws, rs

@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(extracts(), st.booleans())
def test_invented_extracts(tmp_path_factory, extract, small):
    folder = tmp_path_factory.mktemp('x')
    path = write(folder/'a.osm.pbf', *extract, box=(10,46,14,50))
    found, everything = extract_cells(path, CORNER, folder/'s', memory_mb=0 if small else 64), read_all(path)
    for c in CORNER:
        got = found[c]
        assert same(cell_elements(got, c), cell_elements(everything, c))
        for k,need in zip(KINDS, brute(everything, c)): assert need<={e['id'] for e in got[k]}

# --- what is wrong with a file ----------------------------------------------------------------------------------------------

def refused(path, tmp_path, error, text):
    with pytest.raises(error) as e: extract_cells(path, [CELL], tmp_path/'s')
    said = str(e.value)
    assert text in said and '\n' not in said and str(path) in said, said
    assert not [p for p in (tmp_path/'s').glob('extract-*')] if (tmp_path/'s').exists() else True

def some(tmp_path, **kw):
    return write(tmp_path/'a.osm.pbf', nodes((100,100),(200,200)), [(1,[1,2],{'highway':'track'})], [(1,[('w',1,'')],{'type':'route'})], **kw)

def test_missing_file(tmp_path): refused(tmp_path/'no.osm.pbf', tmp_path, FileNotFoundError, 'no.osm.pbf')

def test_a_folder(tmp_path): refused(tmp_path, tmp_path, InputError, 'is not a file')

def test_a_text_file(tmp_path):
    (tmp_path/'a.osm.pbf').write_text('hello\n'*1000)
    refused(tmp_path/'a.osm.pbf', tmp_path, CorruptError, 'fetch it again')

def test_an_empty_file(tmp_path):
    (tmp_path/'a.osm.pbf').write_bytes(b'')
    refused(tmp_path/'a.osm.pbf', tmp_path, CorruptError, 'is empty')

def test_an_unknown_ending(tmp_path):
    (tmp_path/'a.doc').write_text('hello')
    refused(tmp_path/'a.doc', tmp_path, CorruptError, 'not an OSM extract')

def test_no_elements(tmp_path): refused(write(tmp_path/'a.osm.pbf'), tmp_path, CorruptError, 'has no nodes')

@pytest.mark.parametrize('order', ['wnr','nrw','rnw'])
def test_unsorted(tmp_path, order): refused(some(tmp_path, order=order), tmp_path, InputError, 'osmium sort a.osm.pbf')

def test_unsorted_ids(tmp_path):
    path = tmp_path/'a.osm.pbf'
    with osmium.SimpleWriter(str(path)) as w:
        for i in (1,3,2): w.add_node(mutable.Node(id=i, location=at(100,100)))
    refused(path, tmp_path, InputError, 'not sorted (at n')

def test_unsaved_work(tmp_path):
    path = write(tmp_path/'a.osm.pbf', [(-1,*at(100,100),{})])
    refused(path, tmp_path, InputError, 'unsaved')

@pytest.mark.parametrize('ending', ['osh.pbf','osc'])
def test_history(tmp_path, ending):
    path = tmp_path/f'a.{ending}'
    with osmium.SimpleWriter(str(path)) as w:
        for v in (1,2): w.add_node(mutable.Node(id=1, version=v, location=at(100,100), visible=True))
    refused(path, tmp_path, InputError, 'history')

def test_nodes_and_no_ways(tmp_path):
    "What is left of an extract that was cut off at the border of a block"
    refused(write(tmp_path/'a.osm.pbf', nodes(*[(100,100)]*10_001)), tmp_path, CorruptError, 'no ways')

def test_no_relations_are_noted(tmp_path):
    assert not extract_cells(some(tmp_path), [CELL], tmp_path/'s').notes(CELL)[1:]
    path = write(tmp_path/'b.osm.pbf', nodes((100,100),(200,200)), [(1,[1,2],{})])
    assert 'b.osm.pbf has no relations' in extract_cells(path, [CELL], tmp_path/'s').notes(CELL)[-1]

def test_a_time_that_is_none(tmp_path):
    (tmp_path/'a.osm').write_text('<osm version="0.6"><node id="1" version="1" lat="45" lon="13" timestamp="garbage"/></osm>')
    refused(tmp_path/'a.osm', tmp_path, CorruptError, 'damaged')

@pytest.mark.parametrize('mb', [1,17]) # too little for osmium's index; enough for it, but not for what is read
def test_full_disk(tmp_path, mb):
    import resource
    long = {f'note{i}':'v'*250 for i in range(8)} if mb>1 else {}
    path = write(tmp_path/'a.osm.pbf', [(i,x,y,long) for i,x,y,_ in nodes(*[(100,100)]*(10_000 if mb>1 else 1))], [(1,[1],{})])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (mb*2**20, before[1]))
    try:
        with pytest.raises(StorageError, match='make room') as e: extract_cells(path, [CELL], tmp_path/'s', memory_mb=16)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(tmp_path/'s') in str(e.value) and not list((tmp_path/'s').glob('extract-*'))

def test_room_for_the_index(tmp_path, monkeypatch):
    import shutil
    from collections import namedtuple
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: namedtuple('U', 'total used free')(0, 0, 31*2**20))
    with pytest.raises(StorageError, match='make room'): extract_cells(some(tmp_path), [CELL], tmp_path/'s')

def test_comma_in_the_work_folder(tmp_path):
    with pytest.raises(InputError, match='comma'): extract_cells(some(tmp_path), [CELL], tmp_path/'a,b')

def test_replaced_while_it_is_read(tmp_path, monkeypatch):
    path, plain = some(tmp_path), Extract.groups
    def groups(self, index):
        yield from plain(self, index)
        os.utime(path, (1,1))
    monkeypatch.setattr(Extract, 'groups', groups)
    refused(path, tmp_path, CorruptError, 'changed while it was read')

def blob_starts(data):
    "Where the blobs of a .osm.pbf begin: a file that ends there is whole, as far as one can tell"
    out, i = [], 0
    while i<len(data):
        out.append(i)
        head = data[i+4:i+4+int.from_bytes(data[i:i+4],'big')]
        size = shift = 0
        for o in head[head.rindex(b'\x18')+1:]: size |= (o&127)<<shift; shift += 7 # field 3, a number of variable length, comes last
        i += 4+len(head)+size
    assert i==len(data) and len(out)>2
    return out+[i]


def test_cut_off(delivery, tmp_path):
    whole = Path(delivery.pbf).read_bytes()
    starts = blob_starts(whole)
    for n in np.linspace(1, len(whole)-1, 12).astype(int).tolist():
        if n in starts: continue
        path = tmp_path/f'{n}.osm.pbf'
        path.write_bytes(whole[:n])
        refused(path, tmp_path, CorruptError, 'fetch it again')

@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_bytes(delivery, tmp_path_factory, data):
    "One wrong byte: one line that says so, or no effect; never anything else"
    whole = bytearray(Path(delivery.pbf).read_bytes())
    i = data.draw(st.one_of(st.integers(0,300), st.integers(0,len(whole)-1)))
    whole[i] ^= data.draw(st.integers(1,255))
    folder = tmp_path_factory.mktemp('d')
    path = folder/'a.osm.pbf'
    path.write_bytes(whole)
    try: found = extract_cells(path, [CELL], folder/'s')
    except ImagesimError as e:
        assert '\n' not in str(e)
        assert not list((folder/'s').glob('extract-*')) if (folder/'s').exists() else True
    else: assert found.facts['nodes']>0

def test_bad_arguments(tmp_path):
    path = some(tmp_path)
    with pytest.raises(InputError, match='no cell'): extract_cells(path, [], tmp_path/'s')
    with pytest.raises(InputError, match='local folder'): extract_cells(path, [CELL], 's3://bucket/s')
    with pytest.raises(InputError, match='quadkey|cell id'): extract_cells(path, ['Z33-9'], tmp_path/'s')
    (tmp_path/'file').write_text('')
    with pytest.raises(ImagesimError, match='work folder'): extract_cells(path, [CELL], tmp_path/'file')

# --- the spool ----------------------------------------------------------------------------------------------------------------

def test_spool_is_found_again(tmp_path, monkeypatch):
    path, other = some(tmp_path), CELL.neighbours()['E']
    first = extract_cells(path, [CELL,other], tmp_path/'s')
    a = first[CELL]
    monkeypatch.setattr(Extract, 'groups', lambda *a: pytest.fail('the extract was read again'))
    assert extract_cells(path, [CELL], tmp_path/'s')[CELL]==a # fewer cells
    assert list(extract_cells(path, [CELL.id, other.id], tmp_path/'s').cells)==first.cells
    first.discard()
    assert not list((tmp_path/'s').glob('extract-*'))
    with pytest.raises(BaseException, match='read again'): extract_cells(path, [CELL], tmp_path/'s')

def test_discarded_under_another_run(tmp_path):
    path = some(tmp_path)
    a, b = (extract_cells(path, [CELL], tmp_path/'s') for _ in range(2))
    whole = a[CELL]
    a.discard()
    assert b[CELL]==whole and b.folder==a.folder
    b.discard()
    for o in (a,b):
        with pytest.raises(MissingError, match='spool is gone'): o[CELL]
    assert not list((tmp_path/'s').glob('extract-*'))

@pytest.mark.parametrize('name', ['n','ntext','w','wrefs','wtext','rtext'])
def test_a_spool_that_lost_something(tmp_path, name):
    path = write(tmp_path/'a.osm.pbf', [(1,*at(100,100),{'a':'b'}), (2,*at(200,200),{})], [(1,[1,2],{'highway':'track'})], [(1,[('w',1,'')],{'type':'route'})])
    found = extract_cells(path, [CELL], tmp_path/'s')
    os.remove(Path(found.folder)/f'{CELL.id}.{name}')
    with pytest.raises(CorruptError, match='damaged'): found[CELL]

def test_spool_in_another_process(tmp_path):
    import pickle
    found = extract_cells(some(tmp_path), [CELL], tmp_path/'s')
    assert pickle.loads(pickle.dumps(found))[CELL]==found[CELL]
    assert repr(found)=='a.osm.pbf: 1 cell, 0 not covered'
    with pytest.raises(InputError, match='not among'): found[CELL.neighbours()['E']]

def test_a_new_extract_is_read(tmp_path):
    path = some(tmp_path)
    assert extract_cells(path, [CELL], tmp_path/'s')[CELL]['ways']
    path.unlink()
    write(path, nodes((100,100),(300,300),(500,500)))
    os.utime(path, (1e9,1e9))
    got = extract_cells(path, [CELL], tmp_path/'s')[CELL]
    assert len(got['nodes'])==3 and not got['ways']

def test_extract_from_a_bucket(tmp_path, bucket):
    from imagesim.infra import write_bytes
    path = some(tmp_path)
    write_bytes(f'{bucket}/osm/a.osm.pbf', path.read_bytes())
    found = extract_cells(f'{bucket}/osm/a.osm.pbf', [CELL], tmp_path/'s')
    assert found.name=='a.osm.pbf' and found[CELL]==extract_cells(path, [CELL], tmp_path/'t')[CELL]
    assert not [p for p in (tmp_path/'s').rglob('*.pbf')]

RUN = '''
import sys
from imagesim.extract import extract_cells
from imagesim.ard import Cell
extract_cells(sys.argv[1], [Cell.parse(c) for c in sys.argv[3:]], sys.argv[2])
'''

def start(path, folder, cells):
    return subprocess.Popen([sys.executable, '-c', RUN, str(path), str(folder), *(c.id for c in cells)], env={**os.environ, 'PYTHONPATH':str(Path(__file__).parent.parent)})

def test_killed_and_started_again(shared, tmp_path):
    path = shared/'osm/liechtenstein-2022.osm.pbf'
    cells = covering_cells(shapely.box(*Extract(path).bounds))[8:12]
    for late in (0, .15, .4):
        p = start(path, tmp_path/'s', cells)
        while p.poll() is None and not list((tmp_path/'s').glob('extract-*.part')): time.sleep(.01)
        time.sleep(late)
        if p.poll() is None: p.send_signal(signal.SIGKILL)
        killed = p.wait()==-signal.SIGKILL
        if killed:
            left = [f.name for f in (tmp_path/'s').glob('extract-*')]
            assert left and all(f.endswith('.part') for f in left)
    again, fresh = extract_cells(path, cells, tmp_path/'s'), extract_cells(path, cells, tmp_path/'fresh')
    assert all(again[c]==fresh[c] for c in cells)
    assert not list((tmp_path/'s').glob('*.part'))

def test_two_at_once(tmp_path):
    import fcntl
    path = some(tmp_path)
    (tmp_path/'s').mkdir()
    with open(tmp_path/'s/.extract.lock', 'w') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match='another run'): extract_cells(path, [CELL], tmp_path/'s')
    assert extract_cells(path, [CELL], tmp_path/'s')[CELL]['nodes']

def test_memory_stays_bounded(shared, tmp_path):
    path = shared/'osm/liechtenstein-2022.osm.pbf'
    cells = covering_cells(shapely.box(*Extract(path).bounds))
    code = RUN+'''
print(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])
'''
    out = subprocess.run([sys.executable, '-c', code, str(path), str(tmp_path), *(c.id for c in cells)], env={**os.environ, 'PYTHONPATH':str(Path(__file__).parent.parent)}, capture_output=True, text=True, check=True)
    assert int(out.stdout)/1024<500
