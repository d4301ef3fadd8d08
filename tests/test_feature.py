"""From elements to shapes: rings, areas, what a cell has, the sea; against osmium's own areas where real data is at hand."""
import copy, gzip, json, math, random, sys, tracemalloc
from collections import Counter
from functools import lru_cache

import numpy as np, orjson, pandas as pd, pytest, shapely
from hypothesis import assume, given, settings, strategies as st

from imagesim.ard import APRON_M, Cell, reproject
from imagesim.element import merge_elements, node_form, osm_path, read_elements, relation_form, tag_counters, way_form, write_osm
from imagesim.feature import (COAST_M, AREA_EXCEPT, AREA_ONLY, WayPositions, assemble_area, cell_elements, clip_segments, elements_gdf, is_area, is_multipolygon, join_rings,
    line_of, nest_rings, read_osm, sea_polygon, seaward, tag_table, utm_xy)
from imagesim.infra import InputError

CELL = Cell(33, '031111123030')

class Ground:
    "Draws ways in metres around a cell's centre; equal positions share a node"
    def __init__(self, cell=CELL): self.cell, self.ids, self.at = cell, {}, shapely.get_coordinates(cell.geometry().centroid)[0]
    def lonlat(self, xy): return shapely.get_coordinates(reproject(shapely.multipoints(np.asarray(xy, float).reshape(-1,2)+self.at), self.cell.epsg, 4326)).tolist()
    def way(self, id, xy, tags=None, **more):
        nodes = [self.ids.setdefault((round(float(x),2), round(float(y),2)), len(self.ids)+1) for x,y in xy]
        return way_form(id, nodes, self.lonlat(xy), {**(tags or {}), **more})
    def node(self, id, x, y, **tags): return node_form(id, *self.lonlat([(x,y)])[0], tags)
    def point(self, x, y): return self.at+(x,y)

def square(x, y, s): return [(x,y),(x+s,y),(x+s,y+s),(x,y+s),(x,y)]
def ring(x, y, r, n=24): return [*((x+r*math.cos(a), y+r*math.sin(a)) for a in np.linspace(0, 2*np.pi, n, endpoint=False)), (x+r, y)]
def parts(**k): return dict(nodes=[], ways=[], relations=[]) | k
def mp(id, members, **tags): return relation_form(id, [('way',w if isinstance(w,int) else w['id'],'outer') for w in members], dict(type='multipolygon')|tags)
def rows(gdf): return dict(zip(gdf.element, gdf.kind))

@lru_cache(maxsize=3)
def extract(path):
    "Read a whole extract into the forms"
    import osmium
    out, at, kinds = parts(), {}, dict(n='node', w='way', r='relation')
    for o in osmium.FileProcessor(path):
        facts = dict(o.tags), o.version, o.timestamp.strftime('%Y-%m-%dT%H:%M:%SZ')
        if o.is_node():
            at[o.id] = o.location.lon, o.location.lat
            out['nodes'].append(node_form(o.id, *at[o.id], *facts))
        elif o.is_way():
            refs = [n.ref for n in o.nodes]
            out['ways'].append(way_form(o.id, refs, [at.get(n) for n in refs], *facts))
        else: out['relations'].append(relation_form(o.id, [(kinds[m.type], m.ref, m.role) for m in o.members], *facts))
    return out

def overpass_body(path):
    "Read an Overpass body (ways with node ids, nodes with positions) into the forms"
    body = orjson.loads(gzip.decompress(path.read_bytes()))['elements']
    at = {e['id']:(e['lon'],e['lat']) for e in body if e['type']=='node' and 'lon' in e}
    facts = lambda e: [e.get(k) for k in ('tags','version','timestamp')]
    make = dict(node=lambda e: node_form(e['id'], e['lon'], e['lat'], *facts(e)), way=lambda e: way_form(e['id'], e['nodes'], [at.get(n) for n in e['nodes']], *facts(e)),
        relation=lambda e: relation_form(e['id'], [(m['type'],m['ref'],m['role']) for m in e['members']], *facts(e)))
    return merge_elements([{k:[make[k[:-1]](e) for e in body if e['type']==k[:-1]] for k in ('nodes','ways','relations')}])

# areas and lines

@pytest.mark.parametrize('tags,want', [(dict(building='yes'),1), (dict(building='no'),0), (dict(natural='wood'),1), (dict(natural='coastline'),0), (dict(natural='cliff'),0), (dict(natural='tree_row'),0),
    (dict(leisure='pitch'),1), (dict(leisure='track'),0), (dict(leisure='track', area='yes'),1), (dict(highway='residential'),0), (dict(highway='services'),1), (dict(highway='pedestrian', area='yes'),1),
    (dict(barrier='wall'),0), (dict(barrier='hedge', area='yes'),1), (dict(railway='rail'),0), (dict(railway='platform'),1), (dict(waterway='river'),0), (dict(waterway='riverbank'),1), (dict(landuse='forest', area='no'),0),
    (dict(highway='service', amenity='parking'),1), (dict(name='x', source='y'),0), ({},0), (dict(man_made='pier'),1), (dict(man_made='pipeline'),0), (dict(power='line'),0), (dict(power='plant'),1)])
def test_is_area(tags, want): assert is_area(tags)==bool(want)

def test_closed_and_open_ways():
    g = Ground()
    ways = [g.way(1, square(0,0,9), building='yes'), g.way(2, square(0,0,9)[:-1], building='yes'), g.way(3, square(20,0,9), highway='residential'), g.way(4, [(0,0),(5,5),(0,0)], building='yes'), g.way(5, square(40,0,9))]
    assert rows(elements_gdf(parts(ways=ways), CELL))=={'w1':'area','w2':'line','w3':'line','w4':'line'}

def test_line_of_unknown_positions():
    assert line_of(way_form(1, [1,2,3], [None,[0,0],[1,1]])).wkt=='LINESTRING (0 0, 1 1)'
    for at in ([None,None], [None,[0,0]]): assert line_of(way_form(1, [1,2], at)) is None

# rings

def cut(nodes, at, flips):
    "Cut a closed ring of nodes into paths"
    at = sorted({a%(len(nodes)-1) for a in at}) or [0]
    turned = nodes[at[0]:-1]+nodes[:at[0]+1]
    stops = [a-at[0] for a in at]+[len(turned)-1]
    return [turned[a:b+1][::-1 if f else 1] for a,b,f in zip(stops, stops[1:], flips)]

@st.composite
def areas(draw):
    "An area of one to three outer rings with holes, some with islands: its rings as positions, and its true shape"
    rings, shapes = [], []
    for k in range(draw(st.integers(1,3))):
        n = draw(st.integers(8,30))
        outer, holes = ring(k*250, 0, 100, n), []
        for h in range(draw(st.integers(0,3))):
            hole = ring(k*250+50*math.cos(2*h), 50*math.sin(2*h), draw(st.floats(6,15)), draw(st.integers(4,12)))
            holes.append(hole)
            if draw(st.booleans()): shapes.append((island := ring(k*250+50*math.cos(2*h), 50*math.sin(2*h), 3, 5), [])); rings.append(island)
        rings += [outer, *holes]; shapes.append((outer, holes))
    return rings, shapely.union_all([shapely.Polygon(o,h) for o,h in shapes])

@settings(max_examples=120, deadline=None)
@given(areas(), st.data())
def test_rings_cut_in_any_way_assemble_to_the_same(area, data):
    rings, want = area
    paths, at, start = [], {}, 0
    for r in rings:
        ids = [*range(start, start+len(r)-1), start]; start += len(r)
        at |= zip(ids, np.array(r))
        paths += cut(ids, data.draw(st.lists(st.integers(0,40), max_size=6)), data.draw(st.lists(st.booleans(), min_size=8, max_size=8)))
    order = data.draw(st.permutations(range(len(paths))))
    ids = {i+1:([*paths[k]], np.array([at[n] for n in paths[k]])) for i,k in enumerate(order)}
    got = assemble_area(relation_form(1, [('way',i,data.draw(st.sampled_from(['outer','inner','']))) for i in ids]+[('way',1,'')], {}), ids.get)
    assert got.whole and not got.repaired and got.geometry.is_valid
    assert got.geometry.symmetric_difference(want).area<1e-6*want.area
    assert got.outer|got.inner=={*ids} and not got.outer&got.inner

@settings(max_examples=60, deadline=None)
@given(st.permutations(range(4)), st.lists(st.booleans(), min_size=4, max_size=4))
def test_touching_rings(order, flips):
    "Two squares that share a corner, each in two ways: both are found, whatever the order"
    at = {i:np.array(p, float) for i,p in enumerate([(0,0),(9,0),(9,9),(0,9),(18,9),(18,18),(9,18)])}
    paths = [[0,1,2],[2,3,0],[2,4,5],[5,6,2]]
    ways = {i+1:(p, np.array([at[n] for n in p])) for i,k in enumerate(order) for p in [paths[k][::-1 if flips[k] else 1]]}
    got = assemble_area(mp(1, list(ways)), ways.get)
    assert got.whole and got.geometry.area==162 and len(got.geometry.geoms)==2 and got.geometry.is_valid

def test_hole_that_touches_its_outer_ring():
    outer, inner = shapely.Polygon([(0,0),(10,0),(10,10),(5,10),(0,10)]), shapely.Polygon([(5,10),(3,6),(7,6)])
    got, repaired, depth = nest_rings([shapely.get_coordinates(p) for p in (inner,outer)])
    assert got.area==100-8 and not repaired and depth.tolist()==[1,0] and got.is_valid

def test_neighbouring_outer_rings_become_one():
    got, repaired, _ = nest_rings([np.array(square(0,0,10), float), np.array(square(10,0,10), float)])
    assert got.area==200 and got.geom_type=='Polygon' and repaired

@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(st.integers(1,7), min_size=2, max_size=5), max_size=8))
def test_join_rings_loses_and_invents_nothing(paths):
    rings, loose = join_rings(paths)
    for r in rings: assert r[0]==r[-1] and len({*r})==len(r)-1>=3
    segments = lambda ps: Counter(frozenset(s) for p in ps for s in zip(p,p[1:]) if s[0]!=s[1])
    have, used = segments(paths), segments([*rings,*loose])
    assert not used-have
    left = Counter() # what is missing went there and back: an even number of times through each node
    for s,n in (have-used).items():
        for v in s: left[v] += n
    assert all(n%2==0 for n in left.values())

class Node(int):
    "A node id whose comparisons are steps that a trace sees"
    def __eq__(self, o): return int(self)==int(o)
    def __hash__(self): return int(self)

def steps(paths):
    "Count the instructions that joining takes, comparisons of nodes among them"
    n, was = 0, sys.gettrace()
    def trace(frame, event, arg):
        nonlocal n
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        n += event=='opcode'
        return trace
    paths = [[Node(v) for v in p] for p in paths]
    sys.settrace(trace)
    try: join_rings(paths)
    finally: sys.settrace(was)
    return n

def around(n): return [[i,(i+1)%n] for i in range(n)]
SHAPES = dict(star=lambda n: [[0,i] for i in range(1,n+1)], ring=around, wheel=lambda n: [*around(n), *([i,n] for i in range(n))], chain=lambda n: [[i,i+1] for i in range(n)],
    comb=lambda n: [*([i,i+1] for i in range(n//2)), *([i,n+i] for i in range(n//2))], eights=lambda n: [p for i in range(n//3) for p in ([0,2*i+1],[2*i+2,2*i+1],[2*i+2,0])])

@pytest.mark.parametrize('shape', SHAPES)
def test_joining_takes_work_in_proportion_to_the_ways(shape):
    few, many = (steps(SHAPES[shape](n)) for n in (300,1200))
    assert many<4.4*few

def test_joining_is_the_same_as_searching_for_the_first_way_that_leads_on():
    "The plain walk, which searches lists, on random ways"
    def plain(paths):
        free, rings, loose = [i for i,p in enumerate(paths) if p[0]!=p[-1]], [p for p in paths if p[0]==p[-1]], []
        while free:
            stops, trail = [paths[free[0]][0]], []
            while True:
                i = next((i for i in free if stops[-1] in (paths[i][0],paths[i][-1])), None)
                if i is None:
                    if not trail: break
                    loose.append(trail.pop()); stops.pop(); continue
                free.remove(i)
                p = paths[i] if paths[i][0]==stops[-1] else paths[i][::-1]
                trail.append(p)
                if p[-1] in stops:
                    k = stops.index(p[-1])
                    rings.append([n for q in trail[k:] for n in q[:-1]]+[p[-1]])
                    del trail[k:], stops[k+1:]
                else: stops.append(p[-1])
        return rings, loose
    r = random.Random(8)
    for _ in range(300):
        top = r.randint(3,40)
        paths = [[r.randint(1,top), 1000+i, r.randint(1,top)] for i in range(r.randint(0,60))] # a middle node of its own: no ring comes back to one but at an end
        rings, loose = join_rings(paths)
        want, left = plain(paths)
        assert loose==left and rings==[w for w in want if len(w)>3]

def test_a_ring_and_a_star_of_a_hundred_thousand_ways():
    n = 100_000
    a = np.linspace(0, 2*np.pi, n, endpoint=False); xy = np.column_stack([np.cos(a),np.sin(a)])*1e4
    ways = {i+1:(p, xy[p]) for i,p in enumerate(around(n))}
    got = assemble_area(mp(1, list(ways)), ways.get)
    assert got.whole and not got.repaired and got.geometry.geom_type=='Polygon' and len(got.geometry.exterior.coords)==n+1 and len(got.outer)==n
    rings, loose = join_rings(SHAPES['star'](n))
    assert not rings and len(loose)==n

def test_nesting_in_batches():
    "1,200 rings in one another and 400 beside them: several batches give what one would"
    squares = [np.array(square(-k,-k,2*k), float) for k in range(1,1201)]+[np.array(square(2000+10*(k%20),10*(k//20),9), float) for k in range(400)]
    order = random.Random(1).sample(range(1600), 1600)
    got, repaired, depth = nest_rings([squares[i] for i in order])
    back = np.empty(1600, int); back[order] = depth
    assert back.tolist()==[*range(1199,-1,-1), *[0]*400] and not repaired
    assert got.area==sum((-1)**k*4*k*k for k in range(1,1201))+400*81

@pytest.mark.parametrize('squares', [[square(-k,-k,2*k) for k in range(1,4001)], [square(0,0,5)]*4000], ids=['in one another', 'on one another'])
def test_nesting_takes_bounded_memory(squares):
    squares = [np.array(s, float) for s in squares]
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match='4,000 rings .* split the relation'): nest_rings(squares)
        assert tracemalloc.get_traced_memory()[1]<100e6 # all pairs at once are 256 MB
    finally: tracemalloc.stop()

@pytest.mark.parametrize('kind', ['multipolygon','boundary'])
def test_too_many_rings_in_one_another_are_reported(kind, monkeypatch):
    g = Ground()
    ways = [g.way(k, square(-k,-k,2*k), **(dict(building='yes') if k==7 else {})) for k in range(1,31)]
    c = parts(ways=ways, relations=[mp(5, ways, type=kind, landuse='forest')])
    assert rows(elements_gdf(c, CELL))=={'w7':'area','r5':'area'}
    monkeypatch.setattr('imagesim.feature.MAX_PAIRS', 500)
    out = elements_gdf(c, CELL)
    assert rows(out)=={'w7':'area'} and out.attrs['report']=={'area with too many rings in one another, dropped':1} and out.attrs['reported']=={'area with too many rings in one another, dropped':['r5']}
    assert cell_elements(c, CELL)['relations'] # its ways cross the cell, so it stays in the file

def test_wrong_crs_says_what_to_pass():
    for crs in (3857,'wgs84','EPSG:4326',None):
        with pytest.raises(InputError, match=r"pass crs='utm' .* crs=4326 .* \.to_crs"): elements_gdf(parts(), CELL, crs)

def test_never_an_area_from_an_incomplete_ring():
    g = Ground()
    outer = ring(0,0,300,40)
    a, b, hole, other = g.way(1, outer[:20]), g.way(2, outer[19:]), g.way(3, ring(0,0,50)), g.way(4, ring(900,0,100))
    r = relation_form(9, [('way',1,'outer'),('way',2,'outer'),('way',3,'inner'),('way',4,'outer')], dict(type='multipolygon', natural='water'))
    full = elements_gdf(parts(ways=[a,b,hole,other], relations=[r]), CELL)
    assert full.attrs['report']=={} and len(full.geometry[0].geoms)==2
    gap = copy.deepcopy(b); gap['geometry'][5] = None
    for ways,why in (([a,hole,other],'members not at hand'), ([a,gap,hole,other],'members not at hand'), ([a,g.way(2,outer[19:-1]),hole,other],'does not close')):
        out = elements_gdf(parts(ways=ways, relations=[r]), CELL)
        assert out.element.tolist()==['r9'] and out.geometry[0].equals(shapely.get_parts(full.geometry[0])[shapely.area(shapely.get_parts(full.geometry[0])).argmin()])
        assert any(why in k for k in out.attrs['report'])
    assert not len(elements_gdf(parts(ways=[a,hole], relations=[r]), CELL))

def test_closed_area_with_an_unknown_position_is_a_line():
    g = Ground(); w = g.way(1, ring(0,0,90), building='yes'); w['geometry'][3] = None
    v = g.way(2, square(0,0,9), building='yes'); v['geometry'][1:] = [None]*4
    out = elements_gdf(parts(ways=[w,v]), CELL)
    assert rows(out)=={'w1':'line'}
    assert out.attrs['report']=={'way with unknown positions, drawn through the others':1, 'way with fewer than two known positions, dropped':1}

# what is a feature

def test_tags_of_old_relations_come_from_the_outer_ways():
    g = Ground()
    ways = [g.way(1, ring(0,0,300), landuse='forest', name='Old'), g.way(2, ring(0,0,50), landuse='forest', name='Old'), g.way(3, ring(100,0,30), natural='water')]
    out = elements_gdf(parts(ways=ways, relations=[mp(5, [1,2,3], created_by='JOSM')]), CELL)
    assert rows(out)=={'w3':'area','r5':'area'}
    assert out.tags[1]==dict(landuse='forest', name='Old') and len(out.geometry[1].interiors)==2

def test_outer_way_that_repeats_its_relation_counts_once():
    g = Ground()
    ways = [g.way(1, ring(0,0,300), landuse='forest'), g.way(2, ring(900,0,100), landuse='forest', leaf_type='broadleaved'), g.way(3, ring(0,0,90), landuse='meadow'), g.way(4, [(-300,0),(0,500),(300,0)], highway='track')]
    out = elements_gdf(parts(ways=ways, relations=[mp(5, [1,2,3], landuse='forest')]), CELL)
    assert rows(out)=={'w2':'area','w3':'area','w4':'line','r5':'area'}

def test_relations_that_are_no_area():
    g = Ground(); w = g.way(1, ring(0,0,300), highway='path')
    out = elements_gdf(parts(ways=[w], relations=[relation_form(1, [('way',1,'')], dict(type='route')), relation_form(2, [], {}), mp(3, []), mp(4, [1]),
        relation_form(5, [('way',1,''),('way',77,'')], dict(type='boundary', boundary='administrative')), relation_form(6, [('way',1,'outer')], dict(type='boundary', boundary='national_park'))]), CELL)
    assert rows(out)=={'w1':'line','r6':'area'} # r4 is of the old kind, and the tags of its way are not those of an area
    assert out.attrs['report']=={'area without extent, dropped':1, 'boundary, members not fetched':1, 'multipolygon without tags, dropped':1, 'relation that is no area, left out':2}
    assert out.attrs['reported']['boundary, members not fetched']==['r5']

def test_columns_and_empty_cells():
    for out in (elements_gdf(parts(), CELL), elements_gdf(parts(nodes=[node_form(1, 13.5, 45.1)]), CELL, 4326)):
        assert out.columns.tolist()==['element','kind','tags','version','timestamp','geometry'] and len(out)==0 and str(out.timestamp.dtype)=='datetime64[s, UTC]'
    out = elements_gdf(parts(nodes=[node_form(1, 13.5, 45.1, dict(a='b'), 3, '2016-07-15T19:30:04Z'), node_form(2, 13.5, 45.1, dict(a='b')), node_form(3, 13.5, 45.1, dict(a='b'), 1, '0000-00-00T00:00:00Z')]), CELL, 4326)
    assert out.version.tolist()==[3,pd.NA,1] and str(out.timestamp[0])=='2016-07-15 19:30:04+00:00' and out.timestamp.isna().tolist()==[False,True,True]
    assert out.geometry[0].coords[0]==(13.5,45.1) and out.crs.to_epsg()==4326 and out.attrs['report']=={'timestamp that is no time, left out':1}

def test_over_the_antimeridian():
    cell = Cell.at(179.99, -16.5, zone=1)
    g = Ground(cell)
    w = g.way(1, ring(0,0,6000,60), natural='water')
    assert {round(p[0]/abs(p[0])) for p in w['geometry']}=={-1,1}
    got = cell_elements(parts(ways=[w]), cell)
    assert len(got['ways'])==1
    flat, round_ = elements_gdf(got, cell), elements_gdf(got, cell, 4326)
    assert flat.area[0]==pytest.approx(shapely.Polygon(ring(0,0,6000,60)).area, rel=1e-4)
    assert np.ptp(round_.geometry[0].bounds[::2])<.2

# what a cell has

def naive(c, cell):
    "The rules once more, an element at a time"
    box = shapely.box(*cell.buffered(APRON_M)); to = lambda g: reproject(g, 4326, cell.epsg)
    nodes = {n['id'] for n in c['nodes'] if to(shapely.Point(n['lon'],n['lat'])).intersects(box)}
    shapes, ways = {}, set()
    for w in c['ways']:
        known = [p for p in w['geometry'] if p]
        if not known: continue
        line = to(shapely.LineString(known) if len(known)>1 else shapely.Point(known[0])); shapes[w['id']] = line
        closed = len(w['nodes'])>3 and w['nodes'][0]==w['nodes'][-1] and len(known)==len(w['nodes'])
        if line.intersects(box) or (closed and is_area(w.get('tags',{})) and shapely.make_valid(shapely.Polygon(line)).contains(box)): ways.add(w['id'])
    at = {w['id']:(w['nodes'], np.array([p or (np.nan,)*2 for p in w['geometry']])) for w in c['ways']}
    rels = {r['id'] for r in c['relations'] if any(m['ref'] in dict(node=nodes, way=ways, relation=()) [m['type']] for m in r['members'])
        or (r.get('tags',{}).get('type')=='multipolygon' and 'boundary' not in r['tags'] and to(assemble_area(r, at.get).geometry).intersects(box))}
    coast = {w['id']:shapes[w['id']] for w in c['ways'] if w.get('tags',{}).get('natural')=='coastline' and w['id'] in shapes}
    if not any(i in ways and s.intersects(box) for i,s in coast.items()):
        away = {i:s.distance(cell.geometry().centroid) for i,s in coast.items()}
        ways |= {i for i,d in away.items() if d<=min(min(away.values())+1, COAST_M)}
    ways |= {m['ref'] for r in c['relations'] if r['id'] in rels and r.get('tags',{}).get('type')=='multipolygon' for m in r['members'] if m['type']=='way' and m['ref'] in at}
    return nodes, ways, rels

def ids(got): return tuple({e['id'] for e in got[k]} for k in ('nodes','ways','relations'))

@pytest.mark.parametrize('name,where', [('monaco-2021',(7.42,43.74)), ('monaco-2021',(7.50,43.74)), ('helsinki-2019',(24.95,60.17)), ('helsinki-2019',(25.05,60.17))])
def test_cell_elements_of_real_extracts(shared, name, where):
    c, cell = extract(str(shared/f'osm/{name}.osm.pbf')), Cell.at(*where)
    got = cell_elements(c, cell)
    assert ids(got)==naive(c, cell)
    assert bool(got['nodes'])==(where[0] not in (7.50,25.05)) # the others lie beside the extract
    mixed = {k:random.Random(5).sample(v, len(v)) for k,v in c.items()}
    mixed['ways'] += mixed['ways'][:50]
    assert cell_elements(mixed, cell)==got and cell_elements(got, cell)==got

def test_candidates_stay_as_they_are():
    g = Ground(); c = parts(nodes=[g.node(2,0,0), g.node(1,9999,0)], ways=[g.way(7, [(0,0),(9,9)]), g.way(3, [(0,0),(9,9)])])
    before = copy.deepcopy(c)
    got = cell_elements(c, CELL)
    assert c==before and [w['id'] for w in got['ways']]==[3,7] and got['ways'][1] is c['ways'][0]

@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(-4000,4000), st.floats(-4000,4000)), min_size=2, max_size=5))
def test_a_way_is_kept_if_its_line_meets_the_box(xy):
    g = Ground(); w = g.way(1, xy)
    line = shapely.LineString(utm_xy(w['geometry'], CELL.epsg)); box = shapely.box(*CELL.buffered(APRON_M))
    assume(abs(line.distance(box.boundary))>1e-3 or line.intersects(box.buffer(-1)))
    assert bool(cell_elements(parts(ways=[w]), CELL)['ways'])==line.intersects(box)

def lake(way=True):
    g, r = Ground(), ring(0,0,9000,80)
    if way: return parts(ways=[g.way(1, r, natural='water')])
    ways = [g.way(1, r[:30]), g.way(2, r[29:][::-1]), g.way(3, ring(7000,0,300))]
    return parts(ways=ways, relations=[relation_form(4, [('way',1,'outer'),('way',2,'outer'),('way',3,'inner')], dict(type='multipolygon', natural='water'))])

@pytest.mark.parametrize('way', [True,False])
def test_a_cell_in_the_middle_of_a_lake(way):
    got = cell_elements(lake(way), CELL)
    assert got==lake(way)
    out = elements_gdf(got, CELL)
    assert rows(out)=={('w1' if way else 'r4'):'area'} and out.geometry[0].contains(shapely.box(*CELL.buffered(APRON_M)))

def test_a_cell_in_the_hole_of_a_lake_or_beside_it_has_none_of_it():
    g, far = Ground(), lake(False)
    far['ways'][2] = g.way(3, ring(0,0,7000)) # now the cell lies on the island
    assert not any(cell_elements(far, CELL).values())
    assert not any(cell_elements(lake(), Cell.at(*CELL.lonlat).neighbours()['E'].neighbours()['E'].neighbours()['E']).values())
    line = lake(); line['ways'][0]['tags'] = dict(highway='track')
    assert not any(cell_elements(line, CELL).values())

def test_borders_around_a_cell_are_not_fetched():
    c = lake(False); c['relations'][0]['tags'] = dict(type='boundary', boundary='administrative')
    assert not any(cell_elements(c, CELL).values())
    c['relations'][0]['tags'] = dict(type='multipolygon', boundary='administrative')
    assert not any(cell_elements(c, CELL).values())

def test_only_multipolygons_bring_their_ways():
    g = Ground(); near, far = g.way(1, [(0,0),(9000,0)]), g.way(2, [(9000,0),(9000,9000)])
    for t,n in (('multipolygon',2), ('boundary',1), ('route',1)):
        got = cell_elements(parts(ways=[far,near], relations=[relation_form(3, [('way',1,''),('way',2,''),('way',404,'')], dict(type=t))]), CELL)
        assert len(got['ways'])==n and len(got['relations'])==1

def test_positions_that_no_zone_can_show():
    w = way_form(1, [1,2,3], [[13.5,45.1],[-76.4,0.],[13.6,45.1]])
    got = cell_elements(parts(ways=[w], nodes=[node_form(1,-166.5,-45.), node_form(2,0.,90.)]), CELL)
    assert got['nodes']==[]

# the sea

MONACO = Cell.parse('Z32-031111320332')
def at_lonlat(sea, cell, lon, lat): return bool(shapely.contains_xy(sea, *utm_xy([(lon,lat)], cell.epsg)[0]))

def test_the_sea_off_monaco(shared, tmp_path):
    "Port Hercule and Fontvieille's harbour are sea, the palace and the casino are not"
    path = osm_path(tmp_path, MONACO)
    write_osm(path, MONACO, cell_elements(extract(str(shared/'osm/monaco-2021.osm.pbf')), MONACO), dict(source='extract'))
    gdf = read_osm(path)
    sea = gdf[gdf.element=='sea'].geometry.iloc[0]
    for lon,lat in ((7.4260,43.7350), (7.4195,43.7290), (7.44,43.73), (7.43,43.72), (7.44,43.746)): assert at_lonlat(sea, MONACO, lon, lat)
    for lon,lat in ((7.4202,43.7314), (7.4283,43.7393), (7.4255,43.7310), (7.415,43.735), (7.40,43.74)): assert not at_lonlat(sea, MONACO, lon, lat)
    assert gdf.attrs['report']['coastline: an end inside the cell, led on straight']==1 # the extract ends at the border
    land = gdf[gdf.kind.eq('area') & gdf.tags.map(lambda t: t.get('building','pier') not in ('pier','boathouse') and 'floating' not in t)]
    assert land.area.sum()>5e5 and land[land.centroid.within(sea)].area.sum()<.01*land.area.sum()
    assert read_osm(path, sea=False).element.tolist()==gdf.element.tolist()[:-1]
    assert (gdf.tags.iloc[-1], gdf.kind.iloc[-1])==(dict(natural='water', water='sea'), 'area')

def test_a_cell_off_monaco_is_all_sea(shared):
    got = extract(str(shared/'osm/monaco-2021.osm.pbf'))
    for step,share in (('SE',1), ('E',1), ('NE',1), ('NW',0)):
        cell = MONACO.neighbours()[step]
        own = cell_elements(got, cell)
        assert [w['tags'] for w in own['ways'] if w.get('tags',{}).get('natural')=='coastline'], step
        assert sea_polygon(own, cell).area/shapely.box(*cell.buffered(APRON_M)).area==pytest.approx(share), step

def coast(g, id, xy): return g.way(id, xy, natural='coastline')

@pytest.mark.parametrize('quadkey', ['031111123030', '211111123030'])
@settings(max_examples=60, deadline=None)
@given(angle=st.floats(0, 2*math.pi), offset=st.floats(-2000,2000), cuts=st.lists(st.integers(1,38), max_size=4), seed=st.integers(0,99))
def test_sea_on_the_right_of_any_coast(quadkey, angle, offset, cuts, seed):
    g = Ground(Cell(33, quadkey)); r = random.Random(seed)
    d, n = np.array([math.cos(angle),math.sin(angle)]), np.array([-math.sin(angle),math.cos(angle)]) # along the coast, and to its left
    xy = [t*d+(offset+r.uniform(-90,90))*n for t in np.linspace(-6000,6000,40)]
    at = sorted({0,39,*cuts})
    ways = [coast(g, k, xy[a:b+1]) for k,(a,b) in enumerate(zip(at,at[1:]))]; r.shuffle(ways)
    odd = Counter(); sea = sea_polygon(parts(ways=ways), g.cell, report=odd)
    assert not odd and sea.is_valid
    for t in (-1800,0,1800):
        for s,want in ((-120,True),(120,False)):
            p = t*d+(offset+s)*n
            if np.abs(p).max()<2600: assert bool(shapely.contains_xy(sea, *g.point(*p)))==want

@settings(max_examples=60, deadline=None)
@given(x=st.floats(-9000,9000), y=st.floats(-9000,9000), island=st.booleans(), n=st.integers(3,40))
def test_islands_and_lakes_of_sea_near_and_far(x, y, island, n):
    g = Ground(); xy = ring(x,y,700,n)
    sea = sea_polygon(parts(ways=[coast(g, 1, xy if island else xy[::-1])]), CELL)
    box, disk = shapely.box(*CELL.buffered(APRON_M)), shapely.Polygon(np.array(xy)+g.at)
    want = box.difference(disk) if island else box.intersection(disk)
    assert sea.symmetric_difference(want).area<1e-4*box.area

def test_nearest_coast_in_a_corner():
    g = Ground()
    for way_,want in (([(-200,-9000),(0,-4000),(100,-9000)],False), ([(100,-9000),(0,-4000),(-200,-9000)],True)):
        for ways in ([coast(g,1,way_)], [coast(g,1,way_[:2]),coast(g,2,way_[1:])]):
            own = cell_elements(parts(ways=ways), CELL)
            assert len(own['ways'])==len(ways) # both have the corner, both are needed
            assert (sea_polygon(own, CELL).area>0)==want

def test_a_guess_is_counted():
    g = Ground()
    for way_,want in (([(9000,500),(5000,100)],True), ([(5000,100),(9000,500)],False)): # breaks off nearest to the cell
        odd = Counter()
        assert (sea_polygon(parts(ways=[coast(g,1,way_)]), CELL, report=odd).area>0)==want
        assert odd=={'coastline: breaks off where it is nearest, its last piece decides':1}

def test_coast_too_far_away_is_not_kept():
    g = Ground()
    for x,n in ((19_000,1), (21_000,0)): assert len(cell_elements(parts(ways=[coast(g,1,[(x,-3000),(x,3000)])]), CELL)['ways'])==n
    two = [coast(g,1,[(5000,-3000),(5000,3000)]), coast(g,2,[(0,0),(9,9)])] # one crosses: no other is needed
    assert [w['id'] for w in cell_elements(parts(ways=two), CELL)['ways']]==[2]

def test_contradicting_coasts_follow_the_longer():
    g = Ground()
    a, b = coast(g,1,[(4000,1000),(0,1300),(-4000,1000)]), coast(g,2,[(4000,-1000),(-4000,-1000)]) # both: land in the south
    odd = Counter(); sea = sea_polygon(parts(ways=[a,b]), CELL, report=odd)
    assert odd=={'coastline: land and sea on the same side, the longer decides':1}
    assert [bool(shapely.contains_xy(sea, *g.point(0,y))) for y in (2000,0,-2000)]==[True,False,False]

def test_coast_with_a_gap_goes_on_straight():
    g = Ground()
    for way_,n in (([(4000,0),(0,0)],1), ([(500,0),(-500,0)],2), ([(4000,0),(1000,0)],1)):
        odd = Counter(); sea = sea_polygon(parts(ways=[coast(g,1,way_)]), CELL, report=odd)
        assert odd=={'coastline: an end inside the cell, led on straight':n}
        assert sea.area==pytest.approx(shapely.box(*CELL.buffered(APRON_M)).area/2, rel=1e-3)

def test_clip_segments_against_shapely():
    r = np.random.default_rng(3); s = r.uniform(-2,2,(500,2,2)); box = (-1,-1,1,1)
    want = shapely.intersection(shapely.linestrings(s), shapely.box(*box))
    got = clip_segments(s, box)
    assert len(got)==(shapely.length(want)>0).sum()
    assert np.allclose(np.hypot(*(got[:,1]-got[:,0]).T), shapely.length(want[shapely.length(want)>0]))
    assert np.allclose(np.sign(got[:,1]-got[:,0]), np.sign((s[:,1]-s[:,0])[shapely.length(want)>0]))

# real multipolygons

@pytest.mark.parametrize('name,n', [('monaco-2021',39), ('helsinki-2019',98), ('liechtenstein-2022',230)])
def test_multipolygons_are_those_that_osmium_finds(shared, name, n):
    import osmium
    path, fab = str(shared/f'osm/{name}.osm.pbf'), osmium.geom.WKBFactory()
    theirs = {o.orig_id():shapely.from_wkb(fab.create_multipolygon(o)) for o in osmium.FileProcessor(path).with_areas() if o.is_area() and not o.from_way()}
    c = extract(path)
    out = elements_gdf(parts(ways=c['ways'], relations=c['relations']), Cell.at(c['nodes'][0]['lon'], c['nodes'][0]['lat']), 4326, sea=False)
    ours = {int(e[1:]):g for e,g in zip(out.element, out.geometry) if e[0]=='r'}
    assert len(theirs)==n and ours.keys()==theirs.keys()
    for i,g in theirs.items(): assert g.symmetric_difference(ours[i]).area<=1e-9*g.area, f'r{i}'

def test_munich(shared, tmp_path):
    cell, path = Cell.at(11.5755,48.137), None
    path = osm_path(tmp_path, cell)
    write_osm(path, cell, overpass_body(shared/'overpass/munich_1km_union_down.json.gz'), dict(source='overpass'))
    gdf = read_osm(path)
    assert gdf.geometry.is_valid.all() and not gdf.geometry.is_empty.any() and gdf.element.is_unique and gdf.tags.map(bool).all()
    assert Counter(gdf.kind)==dict(point=3675, line=1761, area=1532)
    assert read_osm(path, 4326).to_crs(cell.epsg).geometry.geom_equals_exact(gdf.geometry, 1e-3).all()

# hostile text, and tables

def test_hostile_tags_become_features_unchanged(tmp_path):
    nasty = {'name':'<script>alert(1)</script>', "x'; DROP TABLE y; --":'../../etc', 'a':'\u202e\x00\ud800', 'long':'x'*10_000, 'natural':'tree'}
    path = osm_path(tmp_path, CELL)
    write_osm(path, CELL, parts(nodes=[Ground().node(1,0,0,**nasty)]), dict(source='extract'))
    assert read_osm(path).tags[0]==nasty and tag_table(tmp_path).set_index('key').value.to_dict()==nasty

def test_cell_comes_from_folders_or_file(tmp_path):
    write_osm(tmp_path/'x.json', CELL, parts(nodes=[node_form(1, *CELL.lonlat, dict(a='b'))]), dict(source='extract'))
    assert read_osm(tmp_path/'x.json').crs.to_epsg()==CELL.epsg
    d = read_elements(tmp_path/'x.json'); del d['meta']['cell']
    (tmp_path/'x.json').write_bytes(orjson.dumps(d))
    with pytest.raises(InputError, match='UTM zone'): read_osm(tmp_path/'x.json')

def test_tag_table_adds_cells_up(tmp_path):
    cells = [CELL, CELL.neighbours()['E'], CELL.neighbours()['S']]
    for c in cells[:2]: write_osm(osm_path(tmp_path, c), c, parts(nodes=[node_form(1, 13.5, 45., dict(natural='tree'))], relations=[relation_form(1, [], dict(type='route'))]), dict(source='extract'))
    bad = osm_path(tmp_path, cells[2])
    write_osm(bad, CELL, parts(), dict(source='extract'))
    (tmp_path/'osm_data.json').write_text('{}') # in no cell's folder: not ours
    t = tag_table(tmp_path)
    assert t.values.tolist()==[['natural','tree',2,0,0],['type','route',0,0,2]]
    assert [p for p,_ in t.attrs['problems']]==[bad] and 'is of cell' in t.attrs['problems'][0][1]
    assert tag_table(tmp_path/'33'/CELL.quadkey).columns.tolist()==t.columns.tolist()
