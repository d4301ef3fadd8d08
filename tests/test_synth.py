"""The synthetic delivery: its layout, its truth, and that one seed makes one delivery"""
import json, math, os, resource, signal, subprocess, sys, time
from collections import Counter
from pathlib import Path

import numpy as np
import osmium
import pytest
import rasterio
import shapely
from rasterio.features import rasterize
from rasterio.windows import Window
from rasterio.windows import transform as window_transform

from imagesim.ard import Cell, find_tiles, reproject, tile_table
from imagesim.infra import CorruptError, InputError
from imagesim.synth import OVERVIEWS, RARE, Delivery, Plan, Spec, check_spec, cloud_polygons, make_delivery, strip_polygon
from imagesim.paint import Scene

BANEPA = Path(__file__).parents[2]/'shared/data/banepa/ard/45/031331122210/2021-01-01/A0A0000000000001-visual.tif'
ARGS = dict(size=4, dates=2, seed=3)


@pytest.fixture(scope='session')
def delivery(tmp_path_factory): return make_delivery(tmp_path_factory.mktemp('synth'), **ARGS)


@pytest.fixture(scope='session')
def clear(tmp_path_factory): return make_delivery(tmp_path_factory.mktemp('clear'), clouds=False, **ARGS)


@pytest.fixture(scope='session')
def scene(delivery): return Scene(delivery.landscape())


def painted(d, number, mask=False):
    "The painted area of the home cell's tile at full resolution: (rows, cols, 3), or its mask"
    n = d.spec.size*512
    w = Window((d.plan.col+1)*512, (d.plan.row+1)*512, n, n)
    with rasterio.open(d.tile(d.cells[0], d.acquisitions[number])) as src:
        return src.dataset_mask(window=w) if mask else np.moveaxis(src.read(window=w), 0, -1)


def burn(d, geometry):
    "Rasterise local metres over the painted area"
    n, g = d.spec.size*512, 0.30517578125
    return rasterize([(p,1) for p in np.atleast_1d(shapely.get_parts(geometry))], out_shape=(n,n), transform=rasterio.transform.from_origin(0,n*g,g,g), dtype='uint8')>0


# ---------------------------------------------------------------------------------------------------------------- layout
def layout(path):
    with rasterio.open(path) as src:
        tag = lambda name, **kw: src.get_tag_item(name, 'TIFF', bidx=1, **kw)
        return dict(size=(src.width,src.height), block=src.block_shapes, dtypes=src.dtypes, res=src.res, nodata=src.nodata, compress=src.profile['compress'],
            photometric=src.profile.get('photometric'), interleave=src.profile['interleave'], mask=src.mask_flag_enums, tags=src.tags(), structure=src.tags(ns='IMAGE_STRUCTURE'),
            colours=src.colorinterp, tables=tag('JPEGTABLES'), table_bytes=len(tag('JPEGTABLES'))//2, blank=tag('BLOCK_SIZE_0_0'),
            overview_tables=tag('JPEGTABLES',ovr=0), blocks=sum(tag(f'BLOCK_OFFSET_{x}_{y}') is not None for x in range(34) for y in range(34)))


def directory(path):
    "The TIFF tags of the first directory, without those that hold positions"
    import struct
    with open(path,'rb') as f: b = f.read(4096)
    at = struct.unpack_from('<I',b,4)[0]
    n = struct.unpack_from('<H',b,at)[0]
    return {t:(kind,count) for t,kind,count,_ in struct.iter_unpack('<HHII', b[at+2:at+2+12*n])}, b[8:at]


def test_layout_constants(delivery):
    for path in delivery.tiles:
        got = layout(path)
        assert got['size']==(17408,17408) and got['block']==[(512,512)]*3 and got['res']==(0.30517578125,)*2 and got['nodata'] is None
        assert got['compress']=='jpeg' and got['photometric']=='ycbcr' and got['table_bytes']==142 and got['structure']['LAYOUT']=='COG'
        assert got['blocks']==34*34 and got['blank']=='1664'
        with rasterio.open(path) as src:
            assert tuple(src.overviews(1))==OVERVIEWS and 17408//OVERVIEWS[-1]==544
            cell = delivery.cells[0]
            assert (src.transform.c,src.transform.f)==(cell.bounds.left-156.25, cell.bounds.top+156.25) and src.crs.to_epsg()==cell.epsg


def test_chroma_is_subsampled(delivery):
    import struct
    tags,_ = directory(delivery.tiles[0])
    assert tags[530]==(3,2)
    with rasterio.open(delivery.tiles[0]) as src: at = int(src.get_tag_item('BLOCK_OFFSET_0_0','TIFF',bidx=1))
    data = Path(delivery.tiles[0]).read_bytes()[at:at+21]
    assert data[:4]==b'\xff\xd8\xff\xc0' and data[13]==0x22 and data[16]==0x11    # luma 2 x 2, chroma 1 x 1
    assert struct.unpack('>HH',data[7:11])==(512,512)


@pytest.mark.skipif(not BANEPA.exists(), reason='needs ../shared/data')
def test_layout_of_the_real_tile(delivery):
    real, ours = layout(BANEPA), layout(delivery.tiles[0])
    assert real==ours
    (a,ghost_a), (b,ghost_b) = directory(BANEPA), directory(delivery.tiles[0])
    assert a==b and ghost_a==ghost_b


def test_sparse_and_panchromatic(tmp_path):
    d = make_delivery(tmp_path, size=1, dates=2, pan=1, sparse=True)
    with rasterio.open(d.tiles[0]) as rgb, rasterio.open(d.tiles[1]) as pan:
        assert rgb.count==3 and pan.count==1 and pan.profile['compress']=='deflate'
        held = sum(rgb.get_tag_item(f'BLOCK_OFFSET_{x}_{y}','TIFF',bidx=1) is not None for x in range(34) for y in range(34))
        assert held==1
        assert rgb.read(1, window=Window(0,0,512,512)).max()==0 and rgb.dataset_mask(window=Window(0,0,512,512)).max()==0
        assert pan.dataset_mask(out_shape=(544,544)).any()


def test_overviews_show_the_picture(delivery):
    full = painted(delivery, 1)
    n = delivery.spec.size*512
    with rasterio.open(delivery.tiles[1], overview_level=1) as src:   # every fourth pixel
        part = np.moveaxis(src.read(window=Window((delivery.plan.col+1)*128,(delivery.plan.row+1)*128,n//4,n//4)),0,-1)
    mean = full.reshape(n//4,4,n//4,4,3).mean((1,3))
    assert np.abs(part-mean).mean()<6 and np.corrcoef(part.ravel(),mean.ravel())[0,1]>.97


# ----------------------------------------------------------------------------------------------------------- one seed, one delivery
def contents(root): return {p.relative_to(root):p.read_bytes() for p in sorted(Path(root).rglob('*')) if p.is_file() and p.suffix!='.parquet'}


def test_deterministic(tmp_path):
    a, b, c = (make_delivery(tmp_path/n, size=2, dates=2, seed=s) for n,s in (('a',5),('b',5),('c',6)))
    assert contents(a.root)==contents(b.root)
    assert a.read_places().equals(b.read_places())
    assert Path(a.overpass).read_bytes()!=Path(c.overpass).read_bytes() and not np.array_equal(painted(a,0),painted(c,0))


def test_killed_and_started_again(delivery, tmp_path):
    code = f'from imagesim.synth import make_delivery; make_delivery({str(tmp_path)!r}, **{ARGS!r})'
    run = subprocess.Popen([sys.executable,'-c',code], env={**os.environ,'PYTHONHASHSEED':'7'})
    for _ in range(2400):
        if (tmp_path/'osm'/'synthetic.osm.pbf').exists() or run.poll() is not None: break
        time.sleep(.05)
    run.send_signal(signal.SIGKILL); run.wait()
    assert not any(p.suffix=='.tif' and not p.name.startswith('.') for p in tmp_path.rglob('*'))
    assert not json.loads((tmp_path/'delivery.json').read_text())['complete']
    again = make_delivery(tmp_path, **ARGS)
    left = {k:v for k,v in contents(tmp_path).items() if not k.name.startswith('.')}
    assert again.fresh and left==contents(delivery.root)


def test_makes_only_what_is_missing(tmp_path):
    d = make_delivery(tmp_path, size=1, dates=2)
    before = contents(tmp_path)
    kept = os.stat(d.tiles[0]).st_mtime_ns
    Path(d.tiles[1]).unlink()
    assert make_delivery(tmp_path, size=1, dates=2).fresh
    assert contents(tmp_path)==before and os.stat(d.tiles[0]).st_mtime_ns==kept
    assert not make_delivery(tmp_path, size=1, dates=2).fresh


def test_overwrite_removes_only_its_own(tmp_path):
    make_delivery(tmp_path, size=1, dates=1)
    mine = tmp_path/'ard'/'33'/'notes.txt'
    mine.write_text('keep')
    d = make_delivery(tmp_path, size=1, dates=1, seed=9, overwrite=True)
    assert mine.read_text()=='keep' and len(find_tiles(d.ard))==1


@pytest.mark.parametrize('bad,says', [(dict(size=0),'1 to 32'), (dict(size=33),'1 to 32'), (dict(size=2.5),'whole number'), (dict(dates=0),'1 to 12'), (dict(zone=0),'zone'),
    (dict(zone='33'),'zone'), (dict(quadkey='03111112303'),'level 11'), (dict(quadkey='03111112303x'),'quadkey'), (dict(cells=3),'cells'), (dict(cells=2,size=1),'size 2'),
    (dict(pan=2),'pan'), (dict(seed=-1),'seed')])
def test_bad_arguments(tmp_path, bad, says):
    with pytest.raises(InputError, match=says): make_delivery(tmp_path/'x', **{**dict(size=1),**bad})
    assert not (tmp_path/'x').exists()


# ------------------------------------------------------------------------------------------------------------------------ the map
def test_extract_equals_overpass(delivery):
    answer = json.loads(Path(delivery.overpass).read_text())
    assert answer['version']==.6 and answer['osm3s']['timestamp_osm_base']>f'{delivery.acquisitions[-1].when:%Y-%m-%d}'
    kinds, seen = {'n':'node','w':'way','r':'relation'}, 0
    for o,e in zip(osmium.FileProcessor(delivery.pbf), answer['elements'], strict=True):
        got = dict(type=kinds[o.type_str()], id=o.id, version=o.version, timestamp=o.timestamp.strftime('%Y-%m-%dT%H:%M:%SZ'), changeset=o.changeset, uid=o.uid, user=o.user)
        if len(o.tags): got['tags'] = dict(o.tags)
        if o.is_node(): got |= dict(lat=o.location.lat, lon=o.location.lon)
        elif o.is_way(): got['nodes'] = [n.ref for n in o.nodes]
        else: got['members'] = [dict(type=kinds[m.type], ref=m.ref, role=m.role) for m in o.members]
        assert got==e
        seen += 1
    count = Counter(e['type'] for e in answer['elements'])
    assert seen==sum(count.values()) and min(count[k] for k in ('node','way','relation'))>1
    assert len({(e['type'],e['id']) for e in answer['elements']})==seen


def test_references_resolve(delivery):
    elements = json.loads(Path(delivery.overpass).read_text())['elements']
    ids = {(e['type'],e['id']) for e in elements}
    for e in elements:
        assert all(('node',n) in ids for n in e.get('nodes',())) and all((m['type'],m['ref']) in ids for m in e.get('members',()))
        assert 2<=len(e.get('nodes',(0,0)))<=2000


def test_timestamps(delivery):
    answer = json.loads(Path(delivery.overpass).read_text())
    elements, now = answer['elements'], answer['osm3s']['timestamp_osm_base']
    first, last = (f'{a.when:%Y-%m-%dT%H:%M:%SZ}' for a in delivery.acquisitions)
    ways = [e for e in elements if e['type']=='way']
    between = [e for e in ways if first<e['timestamp']<last]
    assert any(e['timestamp']>last for e in ways) and any(e['tags'].get('building') for e in between if 'tags' in e)
    assert all(e['timestamp']<=now for e in elements)
    forest = next(e for e in elements if e.get('tags',{}).get('landuse')=='forest')
    assert forest['type']=='relation' and forest['timestamp']>first


def test_coast_has_its_water_on_the_right(delivery):
    px, n, g = painted(delivery,0), delivery.spec.size*512, 0.30517578125
    seen = []
    for w in osmium.FileProcessor(delivery.pbf).with_locations().with_filter(osmium.filter.TagFilter(('natural','coastline'))):
        if not w.is_way(): continue
        xy = reproject(shapely.linestrings([(p.lon,p.lat) for p in w.nodes]), 4326, delivery.plan.epsg)
        xy = shapely.get_coordinates(shapely.segmentize(xy,10))-(delivery.plan.left,delivery.plan.bottom)
        for p,q in zip(xy,xy[1:]):
            u = (q-p)/np.hypot(*(q-p))
            for side in (1,-1):
                x, y = (p+q)/2+16*side*np.array([u[1],-u[0]])
                if 3<x<n*g-3 and 3<y<n*g-3: seen.append((side,*px[int((n*g-y)/g),int(x/g)].astype(int)))
    seen = np.array(seen)
    right, left = (seen[seen[:,0]==s] for s in (1,-1))
    assert len(right)>10 and (right[:,3]>right[:,1]).mean()>.9 and (left[:,1]>left[:,3]).mean()>.9   # blue to the right, sand to the left


# ---------------------------------------------------------------------------------------------------------------------- the truth
def class_by_tags(tags, area):
    "The default class schema (DESIGN.md, section 4), written down again from the table"
    b, has = tags.get('building'), lambda k,*v: tags.get(k) in v
    if b:
        if b in ('house','detached','semidetached_house','terrace','bungalow') or (b=='yes' and 35<=area<450): return 'houses'
        if b in ('industrial','warehouse','retail','commercial','hangar','supermarket') or area>=1500: return 'industry_retail'
        return 'apartments' if b in ('apartments','dormitory','hotel') or (b=='yes' and 450<=area<1500) else None
    if has('amenity','parking'): return 'parking'
    if has('natural','water','bay') or has('landuse','reservoir','basin'): return 'water'
    if has('natural','wood') or has('landuse','forest'): return 'forest'
    if has('landuse','farmland'): return 'cropland'
    if has('landuse','orchard','vineyard','plant_nursery'): return 'orchard_vineyard'
    if has('landuse','meadow','grass','recreation_ground') or has('natural','grassland','heath','scrub') or has('leisure','park'): return 'grass'
    if has('leisure','pitch','track','stadium','swimming_pool'): return 'sports'
    if has('landuse','quarry','construction','landfill','brownfield') or has('natural','sand','beach','bare_rock','scree'): return 'bare'


def shapes_of_map(d):
    "Class -> geometries in UTM, from the extract alone"
    utm, wkb = (lambda g: reproject(g, 4326, d.plan.epsg)), osmium.geom.WKBFactory()
    out, coast = {}, []
    for o in osmium.FileProcessor(d.pbf).with_areas():
        tags = dict(o.tags)
        if o.is_area():
            g = utm(shapely.from_wkb(wkb.create_multipolygon(o)))
            out.setdefault(class_by_tags(tags,g.area), []).append(g)
        elif o.is_way():
            g = utm(shapely.linestrings([(n.lon,n.lat) for n in o.nodes]))
            if tags.get('natural')=='coastline': coast.append(g)
            if tags.get('highway') in ('motorway','trunk','primary','secondary'): out.setdefault('major_road',[]).append(g)
            if tags.get('railway') in ('rail','light_rail','narrow_gauge'): out.setdefault('railway',[]).append(g)
    line = shapely.line_merge(shapely.union_all(coast))
    p, q = shapely.get_coordinates(line)[[0,-1]]
    right = np.array([q[0],p[1]]) if (q[0]-p[0])*(q[1]-p[1])<0 else np.array([p[0],q[1]])   # the corner on the water's side
    return out, line, right


def test_truth_equals_the_map(delivery):
    shapes, coast, _ = shapes_of_map(delivery)
    window = shapely.box(*delivery.plan.utm(shapely.box(0,0,delivery.plan.spec.size*156.25,delivery.plan.spec.size*156.25)).buffer(300).bounds)
    halves = shapely.get_parts(shapely.ops.split(window, coast))
    inside = shapely.line_interpolate_point(coast.intersection(window), .5, normalized=True)
    near = coast.project(inside)
    a, b = (shapely.get_coordinates(coast.interpolate(near+k))[0] for k in (-2,2))
    u = (b-a)/np.hypot(*(b-a))
    wet = shapely.Point((a+b)/2+3*np.array([u[1],-u[0]]))
    shapes.setdefault('water',[]).extend(h for h in halves if h.contains(wet))
    truth = delivery.read_places()
    last = truth[(truth.catalog_id==delivery.acquisitions[-1].catalog_id)]
    assert (last.unmapped==1).any()
    checked = Counter()
    for row in last.to_dict('records'):
        if row['unmapped']>0: continue
        place = Cell.parse(row['place']).geometry()
        for name in ('houses','apartments','industry_retail','parking','water','forest','cropland','orchard_vineyard','grass','sports','bare'):
            share = shapely.union_all([g.intersection(place) for g in shapes.get(name,())]).area/place.area
            assert share==pytest.approx(row[name], abs=.001), (row['place'],name)
            checked[name] += share>0
        for name in ('major_road','railway'):
            assert shapely.union_all([g.intersection(place) for g in shapes[name]]).length==pytest.approx(row[name], abs=.5)
            checked[name] += row[name]>0
    assert min(checked.values())>0 and len(checked)==13


def test_unmapped_ground_is_not_in_the_map(delivery):
    shapes,_,_ = shapes_of_map(delivery)
    every = shapely.STRtree([g for k,l in shapes.items() if k not in ('major_road','railway') for g in l])
    truth = delivery.read_places()
    empty = truth[(truth.unmapped==1)&(truth.catalog_id==delivery.acquisitions[-1].catalog_id)]
    painted_there = empty[['cropland','grass','orchard_vineyard','houses','industry_retail']].sum(axis=1)
    assert (painted_there>.2).all()
    for p in empty.place: assert shapely.union_all(every.geometries[every.query(Cell.parse(p).geometry())]).intersection(Cell.parse(p).geometry().buffer(-.5)).area<.01


def test_water_is_dark_and_not_missing(delivery):
    "Truth and pixels lie on each other: the lake is darker than any place on land, and still not black"
    land, n = delivery.landscape(), delivery.spec.size
    rows = delivery.read_places().iloc[:n*n].reset_index()
    for k in range(2):
        px = painted(delivery,k)
        lake = px[burn(delivery, shapely.union_all(land.lakes).buffer(-8))]
        mean = px.astype(float).reshape(n,512,n,512,3).mean((1,3)).reshape(-1,3).mean(1)
        dry = rows.index[(rows.water==0)&(rows.valid==1)]
        assert len(lake)>5000 and lake.mean()<.6*mean[dry].min() and (lake.max(1)>0).mean()>.999
        assert (painted(delivery,k,mask=True)>0)[burn(delivery, land.lakes[0])].all()


# ------------------------------------------------------------------------------------------------------------ changes, masks, clouds
def test_changes_are_in_the_pixels(clear):
    a, b = (painted(clear,k).astype(np.float32) for k in (0,1))
    changes = clear.read_changes()
    assert set(changes.kind)=={'houses_built','solar_added','forest_cleared'} and (changes.before<changes.after).all()
    ok = (painted(clear,0,mask=True)>0)&(painted(clear,1,mask=True)>0)
    diff = np.abs((a-a[ok].mean(0))/a[ok].std(0)-(b-b[ok].mean(0))/b[ok].std(0)).mean(2)
    land = clear.landscape()
    still = ok.copy()
    for c in land.changes: still &= ~burn(clear, c.geometry.buffer(10))
    for f in land.features:
        if f.look=='field': still &= ~burn(clear, f.geometry)   # crops change with the season
    for c in land.changes:
        inside = burn(clear, c.geometry)&ok
        assert inside.sum()>2000 and diff[inside].mean()>1.25*diff[still].mean(), c.kind


def test_changes_match_their_polygons(delivery):
    changes, land = delivery.read_changes(), delivery.landscape()
    for row,c in zip(changes.itertuples(), land.changes, strict=True):
        back = shapely.transform(reproject(row.geometry,4326,delivery.plan.epsg), lambda xy: xy-(delivery.plan.left,delivery.plan.bottom))
        assert back.symmetric_difference(c.geometry).area<.01*c.geometry.area and row.area_m2==pytest.approx(c.geometry.area,abs=.1)


def test_mask_is_what_was_observed(delivery):
    for k,a in enumerate(delivery.acquisitions):
        mask, px = painted(delivery,k,mask=True)>0, painted(delivery,k)
        want = burn(delivery, strip_polygon(delivery.landscape(),a))
        assert (mask!=want).mean()<.001 and px[mask].max(axis=1).min()>0
        with rasterio.open(delivery.tiles[k]) as src: assert (src.dataset_mask(out_shape=(544,544))>0).sum()==pytest.approx(mask.sum()/1024, rel=.03)
    first = painted(delivery,0,mask=True)>0
    assert .05<1-first.mean()<.3
    valid = delivery.read_places().valid.values[:delivery.spec.size**2]
    assert np.allclose(valid.reshape(delivery.spec.size,-1), first.reshape(delivery.spec.size,512,delivery.spec.size,512).mean((1,3)), atol=.005)


def test_masks_on_disk(delivery):
    import geopandas as gpd
    data, cloud = (gpd.read_file(delivery.tile(delivery.cells[0],delivery.acquisitions[k],kind)) for k,kind in ((0,'data-mask'),(1,'cloud-mask')))
    assert data.crs.to_epsg()==cloud.crs.to_epsg()==delivery.plan.epsg
    assert data.area.sum()==pytest.approx((painted(delivery,0,mask=True)>0).sum()*0.30517578125**2, rel=.002)
    item = json.loads(Path(delivery.tiles[1].replace('-visual.tif','.json')).read_text())
    assert item['properties']['tile:clouds_area']==pytest.approx(cloud.area.sum()/1e6, abs=.002) and item['properties']['tile:clouds_percent']>0
    assert not Path(delivery.tile(delivery.cells[0],delivery.acquisitions[0],'cloud-mask')).exists()


def test_cloud_mask_covers_the_clouds(delivery, clear, scene):
    cloudy, blue = painted(delivery,1).astype(int), painted(clear,1).astype(int)
    mask = burn(delivery, cloud_polygons(scene, delivery.acquisitions[1]))
    whiter = (cloudy-blue).min(2)>60
    assert .02<mask.mean()<.25 and whiter.sum()>1000
    assert mask[whiter].mean()>.98 and whiter[mask].mean()>.5
    darker = (cloudy-blue).max(2)<-15
    assert darker[~mask].mean()>.002                                 # and its shadow falls beside it
    assert np.abs(cloudy-blue)[~mask&~darker].mean()<6


def test_two_acquisitions_differ(clear):
    "Sun, season, angle, contrast: no constant offset explains the difference"
    a, b = (painted(clear,k).astype(float).mean(2) for k in (0,1))
    ok = painted(clear,0,mask=True)>0
    assert np.corrcoef(a[ok],b[ok])[0,1]>.3 and np.abs((a-b)-(a-b)[ok].mean())[ok].mean()>8


# -------------------------------------------------------------------------------------------------------------- elsewhere, and larger
@pytest.mark.parametrize('zone,quadkey,epsg', [(60,'213311212301',32760),(17,'032013213121',32617),(1,'331221103210',32701)])
def test_other_zones(tmp_path, zone, quadkey, epsg):
    d = make_delivery(tmp_path, size=1, dates=2, zone=zone, quadkey=quadkey)
    table = tile_table(d.ard)
    assert len(table)==2 and table.attrs['problems']==[] and (table.epsg==epsg).all() and (table.source=='stac').all()
    with rasterio.open(d.tiles[0]) as src:
        row, col = src.index(d.plan.left+5, d.plan.top-5)
        assert src.crs.to_epsg()==epsg and src.dataset_mask(window=Window(col,row,4,4)).all()
    (place,box), = d.plan.places()
    assert place.parent(12)==d.cells[0] and np.allclose(place.bounds, d.plan.utm(box).bounds)
    lon, lat = place.lonlat
    assert shapely.box(*d.read_places().total_bounds).contains(shapely.Point(lon,lat))


def test_across_cells(tmp_path):
    d = make_delivery(tmp_path, size=2, dates=1, cells=4)
    assert len(d.cells)==4 and len(find_tiles(d.ard))==4
    for c in d.cells:
        l,b,r,t = c.bounds
        with rasterio.open(d.tile(c,d.acquisitions[0])) as src: assert (src.dataset_mask(out_shape=(2176,2176))>0).sum()*64*.0931>20000   # all four places: one inside, three in the apron
    assert Counter(Cell.parse(p).parent(12) for p in d.read_places().place)=={c:1 for c in d.cells}


def test_neighbours_in_the_forest_and_at_sea(delivery):
    shapes, coast, _ = shapes_of_map(delivery)
    around = delivery.cells[0].neighbours()
    forest = shapely.union_all(shapes['forest'])
    assert forest.covers(around['NE'].geometry())
    rings = [shapely.boundary(g) for g in shapes['forest']]
    assert not any(r.intersects(around['NE'].geometry()) for r in rings)          # no way of it crosses the cell
    sw = around['SW'].geometry()
    assert not coast.intersects(sw) and not any(g.intersects(sw) for l in shapes.values() for g in l)
    assert coast.intersects(around['W'].geometry()) and coast.intersects(around['S'].geometry())


def test_budget(tmp_path):
    "Eight by eight places, two dates: under 2 GB of memory and 25 MB of disk"
    # not ru_maxrss: a process begins with that of its parent, and pytest may be large by then
    code = f'from imagesim.synth import make_delivery; make_delivery({str(tmp_path)!r}); print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])'
    run = subprocess.run([sys.executable,'-c',code], capture_output=True, text=True, check=True)
    assert int(run.stdout.split()[-1])*1024<2e9
    assert sum(p.stat().st_size for p in tmp_path.rglob('*') if p.is_file())<25e6
    d = Delivery(tmp_path, Spec(**json.loads((tmp_path/'delivery.json').read_text())['spec']))
    truth = d.read_places()
    last = truth[truth.catalog_id==d.acquisitions[-1].catalog_id]
    for name in RARE.values(): assert (last[name]>(.005 if name=='tanks' else .02)).sum()>=2, name
    assert (last.unmapped==1).sum()==4 and (last.forest>.99).any()
    assert Counter(f.look for f in d.landscape().features if f.since==0)['solar']>=2

def test_a_damaged_tile_is_made_again_and_a_hostile_manifest_reaches_nothing(tmp_path):
    d = make_delivery(tmp_path/'a', size=1, dates=1)
    tile = next(Path(d.ard).rglob('*-visual.tif'))
    good = tile.read_bytes()
    tile.write_bytes(good[:1000])
    make_delivery(tmp_path/'a', size=1, dates=1)
    assert tile.stat().st_size==len(good)
    (tmp_path/'victim').write_text('mine')
    manifest = json.loads(Path(d.manifest).read_text())
    manifest['files'].append(dict(path='../victim', size=4))
    Path(d.manifest).write_text(json.dumps(manifest))
    with pytest.raises(CorruptError, match='not the list'): make_delivery(tmp_path/'a', size=1, dates=1, overwrite=True)
    assert (tmp_path/'victim').read_text()=='mine'
    for broken in '[]', '{}', 'null', '{"spec":{}}', '{"spec":{},"files":5,"complete":true}':
        Path(d.manifest).write_text(broken)
        with pytest.raises(CorruptError): make_delivery(tmp_path/'a', size=1, dates=1)
