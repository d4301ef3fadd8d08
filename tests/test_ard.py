"What nbs/00a_ard.ipynb shows, for many more cells, names and deliveries than a notebook should hold"
import datetime, json, os, pickle, time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import shapely
from hypothesis import assume, given, settings, strategies as st
from maxar_ard_grid import Cell as LibraryCell, covers

from imagesim import ard
from imagesim.ard import (APRON_M, ARD_KINDS, ARD_LEVEL, CHIP_LEVEL, TILE_COLUMNS, Cell, Chip, Delivered, TileList, check_catalog_id, covering_cells,
    find_tiles, get_cog_path_from_chip, in_grid, parse_chip, parse_tile_path, read_catalogue, read_tile_table, reproject, serves, serving_cells,
    tile_path, tile_table, tiles_gdf, utm_zone, write_tile_table)
from imagesim.infra import CorruptError, FileInfo, ImagesimError, InputError, MissingError, StorageError

SHARED = Path(__file__).resolve().parents[1].parent/'shared'/'data'
needs_shared = [pytest.mark.shared, pytest.mark.skipif(not SHARED.is_dir(), reason='no ../shared/data')]

zones = st.integers(1, 60)
quadkeys = st.text('0123', min_size=1, max_size=26)
cells = st.builds(Cell, zones, quadkeys)
catalog_ids = st.from_regex(r'[A-Za-z0-9_-][A-Za-z0-9_-]{0,40}(\.[A-Za-z0-9_-]{1,20})?', fullmatch=True).filter(
    lambda s: not s.lower().endswith(('.jpg','.jpeg','.png','.tif','.tiff','.json')))
lons, lats = st.floats(-180, 180), st.floats(-79.9, 83.9)


# --- cells

@given(cells)
def test_a_cell_survives_its_name(c):
    assert Cell.parse(c.id)==c==Cell.from_xy(c.zone, c.x, c.y, c.level) and str(c)==c.id
    assert pickle.loads(pickle.dumps(c))==c and hash(Cell.parse(c.id))==hash(c)

@given(cells)
def test_ids_and_bounds_are_the_librarys(c):
    theirs = LibraryCell(c.id)
    assert (theirs.id, theirs.x, theirs.y, theirs.hemisphere, theirs.proj)==(c.id, c.x, c.y, c.hemisphere, f'EPSG:{c.epsg}')
    assert theirs.bounds==list(c.bounds)

@given(cells)
def test_family(c):
    if c.level<26:
        assert [o.id for o in c.children()]==[LibraryCell(x.x, x.y, x.z, zone=c.zone).id for x in LibraryCell(c.id).children]
        assert all(o.parent()==c and c.contains(o) and not o.contains(c) for o in c.children())
        kids = np.array([o.bounds for o in c.children()])
        assert (*kids[:,:2].min(0), *kids[:,2:].max(0))==tuple(c.bounds)
    if c.level>1: assert c.parent().id==LibraryCell(c.id).parent.id
    assert not Cell(c.zone%60+1, c.quadkey).contains(c)

@given(cells)
def test_neighbours_are_mutual_and_touch(c):
    back = dict(N='S', S='N', E='W', W='E', NE='SW', SW='NE', NW='SE', SE='NW')
    for d,o in c.neighbours().items():
        assert o.neighbours()[back[d]]==c and o.level==c.level and o.zone==c.zone
        shift = 10_000_000*((c.hemisphere=='S')-(o.hemisphere=='S'))
        if d=='N': assert (o.bounds.bottom+shift, o.bounds.left)==(c.bounds.top, c.bounds.left)
        if d=='E': assert (o.bounds.left, o.bounds.top)==(c.bounds.right, c.bounds.top)

@given(st.builds(Cell, zones, st.text('0123', min_size=12, max_size=17)))
def test_neighbours_inside_the_grid_are_the_librarys(c):
    n = 2**c.level
    assume(0<c.x<n-1 and 0<c.y<n-1)
    for d,o in c.neighbours().items():
        if o.quadkey[0]==c.quadkey[0]: assert LibraryCell(c.id).neighbor(d).id==o.id # across the first digit the library errs

def test_no_neighbour_beyond_the_grid():
    assert sorted(Cell(33,'0'*12).neighbours())==['E','S','SE'] and sorted(Cell(33,'3').neighbours())==['N','NW','W']

def test_neighbours_across_the_middle_and_the_equator():
    for y in range(2000, 2060):
        c = Cell.from_xy(33, 2047, y, 12)
        assert c.neighbours()['E'].bounds.left==c.bounds.right==500_000
    assert LibraryCell('Z33-0111').neighbor('E').id!='Z33-1000', 'the library is right here now: say so in the notebook'

@pytest.mark.parametrize('zone', [1, 31, 60])
def test_across_the_equator(zone):
    s = Cell.at(6*zone-183, -0.001, 17, zone)
    n = s.neighbours()['N']
    assert (s.epsg, n.epsg)==(32700+zone, 32600+zone) and (n.bounds.bottom, s.bounds.top)==(0, 10_000_000)
    assert abs(n.lonlat[1]+s.lonlat[1])<1e-9 and n.lonlat[1]>0

@settings(deadline=None)
@given(lons, lats, st.integers(8, 26))
def test_position_to_cell_and_back(lon, lat, level):
    c = Cell.at(lon, lat, level)
    assert c.zone==utm_zone(lon, lat)
    e, n = ard.transformer(4326, c.epsg).transform(lon, lat)
    b, tol = c.bounds, 1e-6
    assert b.left-tol<=e<=b.right+tol and b.bottom-tol<=n<=b.top+tol
    assert Cell.at(*c.lonlat, level, zone=c.zone)==c

@settings(deadline=None, max_examples=50)
@given(st.floats(-179, 179), st.floats(-75, 80))
def test_outlines_are_the_librarys_away_from_the_antimeridian(lon, lat):
    c = Cell.at(lon, lat)
    assert shapely.equals_exact(c.geometry_wgs84().normalize(), LibraryCell(c.id).geom_WGS84.normalize(), 1e-9)
    assert c.geometry_wgs84().contains(shapely.Point(c.lonlat))
    assert abs(c.geometry_wgs84(32).area/c.geometry_wgs84().area-1)<1e-3

@pytest.mark.parametrize('lon,lat', [(180,-17), (-180,66), (179.999,-17), (-179.999,0.1)])
def test_antimeridian(lon, lat):
    c = Cell.at(lon, lat)
    g = c.geometry_wgs84()
    assert g.is_valid and -180<=g.bounds[0] and g.bounds[2]<=180 and g.area<.02
    assert g.distance(shapely.Point(lon, lat))<1e-9
    assert c in covering_cells(shapely.Point(lon, lat)) or not in_grid(c)

@settings(deadline=None, max_examples=40)
@given(st.floats(-170, 170), st.floats(-70, 75), st.floats(.01, .2), st.floats(.01, .2))
def test_covering_cells_are_the_librarys(lon, lat, w, h):
    area = shapely.box(lon, lat, lon+w, lat+h)
    assert {c.id for c in covering_cells(area)}=={c.id for c in covers(area)}

def test_covering_cells_takes_what_people_have():
    area = shapely.box(14.50, 46.04, 14.52, 46.06)
    want = covering_cells(area)
    assert want==covering_cells(area.wkt)==covering_cells(shapely.geometry.mapping(area))==covering_cells(dict(type='Feature', properties={}, geometry=shapely.geometry.mapping(area)))
    for bad in ('POINT (', dict(a=1), 7): 
        with pytest.raises(InputError, match='not a geometry'): covering_cells(bad)

@pytest.mark.parametrize('bad,why', [('z33-0313', "small 'z'"), ('ZZ33-0313', 'zone of two digits'), ('33/0313', "'/'"), ('Z33/0313', "'/'"), ('Z5-0313', 'zone of two digits'),
    ('Z133-0313', 'zone of two digits'), ('Z61-0313', 'no zone 61'), ('Z00-0313', 'no zone 0'), ('Z33-0313\n', 'white space'), (' Z33-0313', 'white space'),
    ('Z33-0413', "'4' at position 2"), ('Z33-', '0 digits'), ('Z33', "'-'"), ('Z33-'+'0'*27, '27 digits'), ('', 'empty'), ('0313', "start with 'Z'"),
    ('Z٣٣-0313', 'zone of two digits'), ('Z33-٠313', 'position 1'), (None, 'NoneType'), (33, 'int'), (b'Z33-0313', 'bytes')])
def test_wrong_cell_ids_say_what_is_wrong(bad, why):
    with pytest.raises(InputError, match=why) as e: Cell.parse(bad)
    assert isinstance(e.value, ValueError) and '\n' not in str(e.value)

@given(st.text(max_size=30) | st.from_regex(r'[zZ]?\d{0,3}[-/_]?[0-4]{0,14}\n?', fullmatch=True))
def test_any_text_is_a_name_or_refused(s):
    for parse,text in ((Cell.parse, lambda c: c.id), (parse_chip, lambda c: c.name)):
        try: out = parse(s)
        except InputError: continue
        assert text(out).removesuffix('.jpg')==s.replace('\\','/').rsplit('/',1)[-1].removesuffix('.jpg')

def test_odd_arguments():
    for bad in (0, 61, -1, '33', 33.0, None):
        with pytest.raises(InputError): Cell(bad, '0313')
    assert Cell(np.int64(33), '0313')==Cell(33, '0313') and type(Cell(np.int64(33), '0313').zone) is int
    for bad in (lambda: Cell(33,'0313').parent(0), lambda: Cell(33,'0').parent(), lambda: Cell(33,'0313').children(3), lambda: Cell(33,'0'*26).children(),
                lambda: Cell.from_xy(33, 4096, 0, 12), lambda: Cell.from_xy(33, 0, 0, 0), lambda: Cell.at(15, 85), lambda: Cell.at(46, 190), lambda: Cell.at(float('nan'), 1),
                lambda: Cell.at(15, 46, zone=61), lambda: Cell(33,'0313').tile_window()):
        with pytest.raises(InputError): bad()

@given(st.builds(Cell, zones, st.text('0123', min_size=12, max_size=26)))
def test_windows_lie_where_the_cells_lie(c):
    w, tile = c.tile_window(), c.parent(12).buffered(APRON_M)
    px = ard.GSD_M
    assert (tile.left+w.col*px, tile.top-w.row*px, w.width*px, w.height*px)==(c.bounds.left, c.bounds.top, c.size_m, c.size_m)
    assert 512<=w.col and w.col+w.width<=17408-512 and 512<=w.row and w.row+w.height<=17408-512


# --- names

@given(cells, catalog_ids)
def test_a_chip_survives_its_name(c, catalog_id):
    chip = Chip(c, catalog_id)
    assert parse_chip(chip.name)==parse_chip(Path('/data/chips/33')/chip.name)==parse_chip(chip.name[:-4])==chip
    assert pickle.loads(pickle.dumps(chip))==chip
    assert os.path.basename(chip.name)==chip.name and os.path.normpath(os.path.join('/chips', chip.name))==f'/chips/{chip.name}'

@given(st.text(max_size=40))
def test_no_catalog_id_leaves_its_folder(s):
    try: check_catalog_id(s)
    except InputError: return
    assert os.path.normpath(os.path.join('/a/b', s))==f'/a/b/{s}' and not s.startswith('.') and s.isascii()

@pytest.mark.parametrize('bad', ['..', '.', 'a/../b', 'a\\b', 'a\0b', 'a\n', 'a b', '', '.a', 'a..b', 'a/b', 'x'*129, 'é', 'a.jpg', 'A.TIF', None, 7, 'a:b', 'a*', '~a', '$a'])
def test_unsafe_catalog_ids(bad):
    with pytest.raises(InputError, match='catalog id'): check_catalog_id(bad)
    with pytest.raises(InputError): Chip(Cell(33,'0313'), bad)

@given(st.builds(Cell, zones, st.text('0123', min_size=12, max_size=12)), st.dates() | st.none(), catalog_ids, st.sampled_from(list(ARD_KINDS)),
       st.sampled_from(['/data/ard', 's3://bucket/some/ard', 'ard', 'https://host/events/x/ard', '/odd/33/031311023120/2021-01-01']))
def test_a_tile_survives_its_path(c, date, catalog_id, kind, root):
    p = tile_path(root, c, date, catalog_id, kind)
    t = parse_tile_path(p)
    assert (t.cell, t.date, t.catalog_id, t.kind, t.path)==(c, date, catalog_id, kind, p)
    assert p.startswith(root+'/') and t.id==f'{c.id}_{catalog_id}'

@given(st.text(max_size=60) | st.from_regex(r'(\d{1,2}/)?[0-4]{10,13}/(\d{4}-\d\d-\d\d/)?.{0,12}-(visual|ms|what)\.(tif|gpkg)\n?', fullmatch=True))
def test_any_path_is_placed_or_refused(s):
    try: t = parse_tile_path(s)
    except InputError as e: assert '\n' not in str(e) or '\n' in s; return
    assert s.endswith(f'{t.cell.quadkey}/' + (f'{t.date}/' if t.date else '') + f'{t.catalog_id}-{t.kind}' + s[s.rindex('.'):])

def test_tile_path_refuses():
    c = Cell(33,'031311023120')
    assert len({tile_path('/d', c, d, 'A') for d in ('2021-05-20', datetime.date(2021,5,20), datetime.datetime(2021,5,20,23,59), pd.Timestamp('2021-05-20T01:02Z'))})==1
    for bad in (lambda: tile_path('/d', c, pd.NaT, 'A'), lambda: tile_path('/d', c, 20210520, 'A'), lambda: tile_path('/d', c.children()[0], None, 'A'), lambda: tile_path('/d', c, '2021-1-1', 'A'), lambda: tile_path('/d', c, '2021-02-30', 'A'),
                lambda: tile_path('/d', c, None, '../A'), lambda: tile_path('/d', c, None, 'A', 'rgb')):
        with pytest.raises(InputError): bad()


# --- deliveries

C = Cell(33,'031311023120')
E, S, Z34 = C.neighbours()['E'], C.neighbours()['S'], Cell.at(21, -0.01)
A1, A2, UUID = '10300100B3841C00', '10300100C0FFEE00', '0f3a0c1e-9d5b-4c1f-8a77-20d3c5b1e9aa-inv'

def put(path, text=''):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
    return str(path)

def item(cell=C, catalog_id=A1, when='2021-05-20T10:09:34Z', **over):
    b = cell.bounds
    p = {'datetime':when, 'platform':'WV02', 'gsd':.52, 'catalog_id':catalog_id, 'utm_zone':cell.zone, 'quadkey':cell.quadkey, 'view:off_nadir':21.5, 'view:azimuth':98.0,
         'view:sun_azimuth':151.0, 'view:sun_elevation':44.8, 'proj:epsg':cell.epsg, 'proj:bbox':[b.left, b.bottom, b.left+2500, b.top], 'tile:data_area':12.5, 'tile:clouds_percent':8}
    half = reproject(shapely.box(b.left, b.bottom, b.left+2500, b.top), cell.epsg, 4326)
    return dict(type='Feature', id=f'{cell.id}/{catalog_id}', geometry=shapely.geometry.mapping(half), properties={**p, **over}, assets={'visual':{'href':f'./{catalog_id}-visual.tif'}})

@pytest.fixture
def root(tmp_path):
    r = tmp_path/'ard'
    for args in ((C,'2021-05-20',A1), (C,'2022-03-02',UUID), (E,'2021-05-20',A1), (Z34,'2021-05-20',A1)): put(tile_path(r, *args))
    for c in (C, E, Z34): put(tile_path(r, c, '2021-05-20', A1).replace('-visual.tif','.json'), json.dumps(item(c)))
    put(r/'acquisition_collections'/f'{A1}_collection.json', '{}'); put(r/'order_collections/1_root_collection.json', '{}'); put(r/'1-request.json', '{}')
    put(r/'33'/C.quadkey/'osm_data.json', 'not even JSON')
    return r

def test_root_zone_cell_and_day(root, monkeypatch):
    tiles = find_tiles(root)
    assert [t.id for t in tiles]==[f'{C.id}_{A1}', f'{C.id}_{UUID}', f'{E.id}_{A1}', f'{Z34.id}_{A1}'] and not tiles.problems and not tiles.strays
    assert tiles.zones==[33,34] and tiles.cells==[C,E,Z34]
    for sub,n in (('33',3), (f'33/{C.quadkey}',2), (f'33/{C.quadkey}/2022-03-02',1), ('34/',1)):
        assert [t.id for t in find_tiles(f'{root}/{sub}')]==[t.id for t in tiles if f'/{sub}' in t.path][:n] and len(find_tiles(f'{root}/{sub}'))==n
    monkeypatch.chdir(root/'33')
    assert [t.id for t in find_tiles('.')]==[t.id for t in tiles[:3]]
    monkeypatch.chdir(root/'33'/C.quadkey)
    assert [t.id for t in find_tiles('.')]==[t.id for t in tiles[:2]]
    monkeypatch.setenv('HOME', str(root.parent))
    assert len(find_tiles('~/ard'))==4
    assert pickle.loads(pickle.dumps(tiles)).root==tiles.root

def test_one_zone_walks_no_other(root, monkeypatch):
    seen, real = [], ard.list_files
    monkeypatch.setattr(ard, 'list_files', lambda p, *a: (seen.append(str(p)), real(p, *a))[1])
    assert find_tiles(root, zone=34).zones==[34]
    assert str(root) not in seen and str(root/'33') not in seen and str(root/'34') in seen
    with pytest.raises(InputError, match='holds no tile of zone 35; there is 33, 34'): find_tiles(root, zone=35)
    with pytest.raises(InputError, match='no tile of zone 34'): find_tiles(root/'33', zone=34)

def test_variants(tmp_path):
    r = tmp_path/'odd'
    put(tile_path(r, C, None, UUID))                                        # no date folder, UUID with a suffix
    put(tile_path(r/'orders/17', E, '2021-05-20', A1))                      # an order under a prefix of its own
    put(tile_path(r, C, '2021-05-20', 'under_score.v2'))
    put(tile_path(r, S, None, A1, 'pan'))                                   # panchromatic only
    put(tile_path(r, C, None, UUID, 'cloud-shadow-mask'))
    put(r/f'33/{C.quadkey}/{UUID}-pan-flare-mask.tif')
    tiles = find_tiles(r)
    assert [(t.cell, t.catalog_id, t.date and str(t.date)) for t in tiles]==[(C,UUID,None), (C,'under_score.v2','2021-05-20'), (E,A1,'2021-05-20')] and not tiles.problems
    assert tiles[0].beside('cloud-shadow-mask').endswith('.gpkg') and tiles[0].beside('pan-flare-mask').endswith('.tif') and tiles[0].beside('ms') is None
    assert [t.cell for t in find_tiles(r, kind='pan')]==[S] and find_tiles(r, kind='ms')==[]
    assert tiles.kinds=={'pan':1, 'cloud-shadow-mask':1, 'pan-flare-mask':1} and '1 pan' in repr(tiles)

@pytest.mark.parametrize('rel,why', [('33/031311023120/2021-05-20/preview.tif', 'is not named'), ('33/031311023120/2021-05-20/A-visual.tiff', 'is not named'),
    ('33/031311023120/2021-05-20/A-VISUAL.TIF', 'is not named'), ('3/031311023120/A-visual.tif', "folder '3' is not a zone's"), ('75/031311023120/A-visual.tif', 'no zone 75'),
    ('33/0313110231201/A-visual.tif', '13 digits'), ('33/0313110231/A-visual.tif', '10 digits'), ('33/031311023120/2021-13-01/A-visual.tif', 'not a day'), ('33/031311023120/scene/A-visual.tif', "is not a cell's"),
    ('A-visual.tif', "is not a cell's"), ('33/031311023120/a b-visual.tif', 'not safe'), ('33/031311023120/-visual.tif', 'is not named'), ('33/041311023120/A-visual.tif', "is not a cell's")])
def test_what_looks_like_a_tile_is_reported(root, rel, why):
    bad = put(root/rel)
    tiles = find_tiles(root)
    assert len(tiles)==4 and len(tiles.problems)==1
    path, reason = tiles.problems[0]
    assert path==bad and why in reason and rel in repr(tiles) and str(root) not in repr(tiles)

def test_doubles_are_reported(root):
    late = put(tile_path(root, C, '2021-05-21', A1)); undated = put(tile_path(root, C, None, A1)); again = put(tile_path(root/'reorder', C, '2021-05-20', A1))
    tiles = find_tiles(root)
    assert len(tiles)==4 and len({t.id for t in tiles})==4
    assert [t.path for t in tiles if t.id==f'{C.id}_{A1}']==[late]
    assert {p for p,_ in tiles.problems}=={undated, again, tile_path(root, C, '2021-05-20', A1)}
    assert all('same cell and catalog id as 33/' in why for _,why in tiles.problems)

def test_no_delivery(tmp_path):
    put(tmp_path/'photos/a.jpg'); put(tmp_path/'loose/A-visual.tif'); (tmp_path/'empty').mkdir(); put(tmp_path/f'osm/33/{C.quadkey}/osm_data.json')
    for name,why in (('photos', 'it holds 1 other file.*a.jpg'), ('empty', 'it is empty'), ('loose', "look like tiles, e.g. A-visual.tif: folder 'loose' is not a cell's"), ('osm', 'osm_data.json')):
        with pytest.raises(InputError, match=f'{name} is not a delivery: no <zone>/<quadkey>.*{why}'): find_tiles(tmp_path/name)
    with pytest.raises(MissingError): find_tiles(tmp_path/'nowhere')
    with pytest.raises(ImagesimError): find_tiles(tmp_path/'photos/a.jpg')
    with pytest.raises(InputError): find_tiles('')
    with pytest.raises(InputError, match='only local paths and s3'): find_tiles('ftp://host/ard')

def test_cog_of_a_chip(root):
    place = C.children(CHIP_LEVEL)[77]
    want = tile_path(root, C, '2021-05-20', A1)
    for where in (root, root/'33', root/'33'/C.quadkey, find_tiles(root), str(root)+'/'):
        assert os.path.normpath(get_cog_path_from_chip(Chip(place, A1).name, where))==want
        for c in (C, place.parent(15), place.children()[2], place.children(19)[7]): assert os.path.normpath(get_cog_path_from_chip(Chip(c, A1), where))==want
    with pytest.raises(MissingError, match=f'of {C.id} there is {A1}, {UUID}'): get_cog_path_from_chip(Chip(place, A2), root)
    with pytest.raises(MissingError, match='there is no tile of Z60'): get_cog_path_from_chip(Chip(Cell(60, place.quadkey), A1), root)
    with pytest.raises(MissingError): get_cog_path_from_chip(Chip(Cell(34, place.quadkey), A1), root/'33')
    with pytest.raises(InputError, match='more than one tile'): get_cog_path_from_chip(Chip(C.parent(), A1), root)
    put(root/'33'/S.quadkey/'osm_data.json')
    with pytest.raises(MissingError, match='no tile of '+S.id): get_cog_path_from_chip(Chip(S, A1), root)
    put(tile_path(root/'orders/9', S, None, A2))
    assert get_cog_path_from_chip(Chip(S, A2), find_tiles(root))==tile_path(root/'orders/9', S, None, A2)

def test_a_hundred_thousand_tiles(monkeypatch):
    n, side = 0, [Cell.from_xy(33, 1990+i, 1100+j, 12) for i in range(100) for j in range(100)]
    files = [FileInfo(p, 1, 1.) for c in side for d in range(10) for p in (lambda t: (t, t.replace('-visual.tif','.json'), t.replace('-visual.tif','-cloud-mask.gpkg')))(
        tile_path('/big', c, f'2021-01-{d+1:02d}', f'{d:016X}'))]
    calls = []
    monkeypatch.setattr(ard, 'list_files', lambda p, *a: (calls.append(p), files)[1])
    start = time.perf_counter()
    tiles = find_tiles('/big')
    assert len(tiles)==100_000 and len(calls)==1 and all(t.item and len(t.others)==1 for t in tiles[::999])
    assert time.perf_counter()-start<30, 'a hundred thousand tiles took longer than half a minute, without the disk'


# --- the tile table

def test_table_from_items(root):
    t = tile_table(root)
    assert list(t.columns)==TILE_COLUMNS and t.attrs['problems']==[] and list(t.source)==['stac','files','stac','stac']
    r = t.iloc[0]
    assert (r.tile, r.cell, r.zone, r.catalog_id, r.date, r.sensor, r.epsg, r.path)==(f'{C.id}_{A1}', C.id, 33, A1, '2021-05-20', 'WV02', 32633, f'33/{C.quadkey}/2021-05-20/{A1}-visual.tif')
    assert (r.off_nadir, r.view_azimuth, r.sun_elevation, r.sun_azimuth, r.gsd_native, r.cloud_share, r.valid_area_km2)==(21.5, 98, 44.8, 151, .52, .08, 12.5)
    assert r.datetime==pd.Timestamp('2021-05-20T10:09:34Z') and r['size']==0 and abs(r.data_share-.5)<1e-6 and shapely.from_wkb(r.footprint).is_valid
    bare = t.iloc[1]
    assert bare.date=='2022-03-02' and bare.epsg==32633 and bare.footprint is None
    assert bare[['datetime','sensor','off_nadir','cloud_share','data_share','valid_area_km2','gsd_native']].isna().all()
    assert abs(t.data_share[3]-.5)<1e-6 and t.epsg[3]==32734 # south of the equator
    assert tile_table(find_tiles(root)).equals(t) and len(tile_table(root, zone=34))==1

def test_table_survives_parquet(root, tmp_path):
    t = tile_table(root)
    write_tile_table(t, tmp_path/'deep/tiles.parquet')
    back = read_tile_table(tmp_path/'deep/tiles.parquet')
    pd.testing.assert_frame_equal(back, t)
    assert 'problems' not in back.attrs
    again = tmp_path/'again.parquet'
    write_tile_table(tile_table(root), again)
    assert again.read_bytes()==(tmp_path/'deep/tiles.parquet').read_bytes()
    import pyarrow.parquet as pq
    schema = pq.read_schema(again)
    assert str(schema.field('datetime').type)=='timestamp[ms, tz=UTC]' and str(schema.field('footprint').type)=='binary'

def test_an_empty_table_keeps_its_types(root, tmp_path):
    t = tile_table(TileList([], root))
    full = tile_table(root)
    assert len(t)==0 and list(t.dtypes)==list(full.dtypes)
    write_tile_table(t, tmp_path/'t.parquet')
    assert len(read_tile_table(tmp_path/'t.parquet'))==0

BAD_ITEMS = [('{"type": "Feat', 'not valid JSON'), ('', 'not valid JSON'), ('[]', 'not a STAC item'), ('{"type":"Feature"}', 'no properties'), (dict(quadkey=E.quadkey), 'its cell is'), (dict(utm_zone=34), 'its cell is Z34'),
    (dict(utm_zone=99), 'no zone 99'), (dict(quadkey=31), 'quadkey'), (dict(catalog_id=A2), f'its catalog id is {A2}'), ({'proj:epsg':32733}, 'its EPSG code is 32733'), (dict(when='2021-05-21T00:00:00Z'), 'its day is 2021-05-21'),
    (dict(when='yesterday noon'), 'datetime'), ({'gsd':'fine'}, "gsd is 'fine'"), ({'view:off_nadir':[1]}, 'view:off_nadir'), ({'proj:bbox':[1,2,3]}, 'not four numbers'), ({'proj:bbox':'a,b,c,d'}, 'not four numbers'),
    ({'proj:bbox':[0,0,1,1]}, 'is not inside'), ({'proj:bbox':[240001,3706000,240000,3707000]}, 'is not inside'), (dict(geometry=dict(type='Polygon', coordinates=[[1,2]])), 'geometry'), (dict(geometry=dict(type='Blob')), 'geometry'),
    (dict(geometry=dict(type='Point', coordinates=[12.22,33.47])), 'no polygon but POINT'), (dict(geometry=dict(type='Polygon', coordinates=[])), 'geometry'),
    (dict(geometry=dict(type='Polygon', coordinates=[[[0,900],[1,900],[1,901],[0,900]]])), 'not in longitude and latitude'),
    (dict(geometry=shapely.geometry.mapping(shapely.box(-70, 10, -69, 11))), 'its footprint lies at'), ({'proj:bbox':'nan,0,1,1'}, 'not four numbers'),
    (dict(datetime='-5'), "datetime is '-5'"), ({'view:off_nadir':'inf'}, 'not a number')]

@pytest.mark.parametrize('bad,why', BAD_ITEMS)
def test_a_bad_item_is_one_problem(root, bad, why):
    path = tile_path(root, C, '2021-05-20', A1).replace('-visual.tif','.json')
    if isinstance(bad, dict):
        geometry = bad.get('geometry')
        made = item(**{k:v for k,v in bad.items() if k!='geometry'})
        if geometry: made['geometry'] = geometry
        bad = json.dumps(made)
    put(path, bad)
    t = tile_table(root)
    assert len(t)==4 and list(t.source)==['files','files','stac','stac']
    assert [p for p,_ in t.attrs['problems']]==[path] and why in t.attrs['problems'][0][1]
    assert np.isnan(t.off_nadir[0]) and t.footprint[0] is None

def test_missing_stays_missing(root):
    sparse = item(**{'tile:clouds_percent':None, 'gsd':None}, platform=None)
    for k in ('view:off_nadir', 'proj:bbox', 'catalog_id'): del sparse['properties'][k]
    sparse['properties']['datetime'] = None
    sparse['geometry'] = None
    put(tile_path(root, C, '2021-05-20', A1).replace('-visual.tif','.json'), json.dumps(sparse))
    r = tile_table(root).iloc[0]
    assert r.source=='stac' and r.view_azimuth==98 and r.date=='2021-05-20'
    assert r[['datetime','sensor','off_nadir','cloud_share','gsd_native','data_share']].isna().all() and r.footprint is None

@pytest.mark.parametrize('geometry,share', [(shapely.Polygon([(12.2,33.45), (12.25,33.5), (12.25,33.45), (12.2,33.5)]), None), (C_SQUARE:=Cell(33,'031311023120').geometry_wgs84(), 1),
    (shapely.MultiPolygon([C_SQUARE.buffer(.01), shapely.box(50, 50, 51, 51)]), 1)])
def test_unusual_footprints(root, geometry, share):
    strange = item()
    strange['geometry'] = shapely.geometry.mapping(geometry)
    put(tile_path(root, C, '2021-05-20', A1).replace('-visual.tif','.json'), json.dumps(strange))
    t = tile_table(root)
    assert t.source[0]=='stac' and 0<=t.data_share[0]<=1 and abs(t.data_share[2]-.5)<1e-6
    if share is not None: assert t.data_share[0]==pytest.approx(share, abs=1e-6)

def test_items_elsewhere(root, tmp_path):
    here = tile_path(root, C, '2021-05-20', A1).replace('-visual.tif','.json')
    text = Path(here).read_text()
    places = dict(cell=root/'33'/C.quadkey/f'{A1}.json', tree=root/'stac/33'/C.quadkey/f'{A1}.json', flat=root/'items/whatever.json', deep=root/'33'/C.quadkey/'2021-05-20/meta/x.json')
    for name,p in places.items():
        Path(here).unlink(missing_ok=True)
        put(p, text)
        t = tile_table(root)
        assert list(t.source)==['stac','files','stac','stac'], name
        p.unlink()
    put(tmp_path/'catalog/anything.json', text); put(tmp_path/'catalog/broken.json', '{'); put(tmp_path/'catalog/other.json', '{"properties":{}}')
    t = tile_table(root, stac=tmp_path/'catalog')
    assert t.source[0]=='stac' and [Path(p).name for p,_ in t.attrs['problems']]==['broken.json']

def test_no_date_folder_takes_the_items_day(tmp_path):
    p = put(tile_path(tmp_path, C, None, UUID))
    put(p.replace('-visual.tif','.json'), json.dumps(item(catalog_id=UUID)))
    r = tile_table(tmp_path).iloc[0]
    assert r.date=='2021-05-20' and r.source=='stac'

def test_one_catalog_id_on_two_days(tmp_path):
    "The items stand in a folder of their own; each goes to the tile of its day"
    put(tile_path(tmp_path, C, '2021-05-20', A1)); put(tile_path(tmp_path, E, '2021-05-21', A1))
    put(tmp_path/'items/1.json', json.dumps(item(C))); put(tmp_path/'items/2.json', json.dumps(item(C, when='2021-05-22T00:00:01Z'))); put(tmp_path/'items/3.json', json.dumps(item(E, when='2021-05-21T23:59:59Z')))
    t = tile_table(tmp_path)
    assert list(t.source)==['stac','stac'] and list(t.datetime.dt.day)==[20,21] and t.attrs['problems']==[]

def test_catalogue_fills_gaps(root, tmp_path):
    made = item(C, UUID, '2022-03-02T01:02:03Z')
    made['properties']['visual'] = tile_path('https://host/ard', C, '2022-03-02', UUID)
    made['properties']['proj:bbox'] = ','.join(map(str, made['properties']['proj:bbox']))
    bad = item(E, A2); bad['properties']['visual'] = 'https://host/picture.tif'
    bare = item(E, A2); bare['assets'] = {}
    put(tmp_path/'event.geojson', json.dumps(dict(type='FeatureCollection', features=[made, bad, bare])))
    cat = read_catalogue(tmp_path/'event.geojson')
    assert list(cat.event)==['event'] and [Path(p).name for p,_ in cat.attrs['problems']]==['event.geojson#1','event.geojson#2']
    t = tile_table(root, catalogue=cat)
    assert list(t.source)==['stac','catalogue','stac','stac'] and t.off_nadir[1]==21.5 and t.path[1].startswith('33/') and t['size'][1]==0
    assert read_catalogue(tmp_path).equals(cat)
    for text,why in (('{', 'not valid JSON'), ('[]', 'not a GeoJSON'), ('{"features":1}', 'not a GeoJSON')):
        with pytest.raises(CorruptError, match=why): read_catalogue(put(tmp_path/'bad.geojson', text))
    (tmp_path/'none').mkdir()
    with pytest.raises(InputError, match='no .geojson'): read_catalogue(tmp_path/'none')

def test_gdf(root):
    g = tiles_gdf(root)
    assert g.crs.to_epsg()==4326 and len(g)==4 and g.geometry.is_valid.all() and g.geometry[0].equals(C.geometry_wgs84())
    f = tiles_gdf(tile_table(root), 'footprint')
    assert f.geometry.isna().tolist()==[False,True,False,False]
    pytest.importorskip('folium')
    assert 'leaflet' in g.explore().get_root().render().lower()


# --- zone edges

def test_delivered_at_any_level():
    d = Delivered([C.id, E, 'Z34-013331230303', C.children(17)[5].id])
    assert C in d and C.children(17)[9] in d and C.parent() not in d and Cell(34,C.quadkey) not in d
    assert Delivered(d).ids==d.ids and C in Delivered(find_tiles_like(C))

def find_tiles_like(c): return [parse_tile_path(tile_path('/x', c, None, 'A'))]

@settings(deadline=None, max_examples=60)
@given(st.integers(-29, 29), st.floats(-70, 75), st.floats(-.03, .03), st.integers(12, 18))
def test_the_owner_serves_if_delivered_and_else_the_other(edge, lat, off, level):
    lon = edge*6+off
    mine, other = utm_zone(lon, lat), utm_zone(edge*6-off-1e-9*(off==0), lat)
    assume(mine!=other)
    own, foreign = Cell.at(lon, lat, level, mine), Cell.at(lon, lat, level, other)
    assume(utm_zone(*own.lonlat)==mine and utm_zone(*foreign.lonlat)==mine)
    twin = Cell.at(*foreign.lonlat, level)
    up = lambda c: c.parent(12)
    assert serves(own, [up(own)]) and serves(own, [up(own), up(foreign)]) and not serves(own, [up(foreign)])
    assert serves(foreign, [up(foreign)]) and not serves(foreign, [up(foreign), up(twin)]) and not serves(foreign, [up(twin)])
    assert serves(foreign, [up(foreign), up(twin)], margin_m=10_000)

@pytest.mark.parametrize('lon,lat', [(180,-17), (6,50), (-66,0), (174,-36.8)])
def test_no_ground_is_served_twice_or_never(lon, lat):
    "Whatever zones were delivered, each position has a serving place within half a place of the edge, and farther off exactly one"
    cells = [Cell.at((lon+dx+180)%360-180, lat+dy, 12, z) for dx in (-.04,0,.04) for dy in (-.04,0,.04) for z in {utm_zone((lon-.1+180)%360-180), utm_zone((lon+.1+180)%360-180)}]
    delivered = Delivered(cells)
    rng = np.random.default_rng(7)
    for dx,dy in rng.uniform(-.05, .05, (200,2)):
        x = (lon+dx+180)%360-180
        here = [Cell.at(x, lat+dy, 17, z) for z in {c.zone for c in cells}]
        n = len(serving_cells(here, delivered))
        metres = abs(dx)*111_320*np.cos(np.radians(lat))
        if any(p in delivered for p in here) and metres>120 and Cell.at(x, lat+dy, 17) in delivered: assert n==1
        assert n<=1 or metres<120
        if here and all(p in delivered for p in here): assert len(serving_cells(here, delivered, margin_m=111))>=1

def test_serving_cells_of_nothing(): assert serving_cells([])==[] and serving_cells([], [C])==[] and not serves(C, [])


# --- a bucket

@pytest.fixture
def bucket(monkeypatch):
    server_ = pytest.importorskip('moto.server')
    import boto3
    server = server_.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for k,v in dict(AWS_ENDPOINT_URL=f'http://{host}:{port}', AWS_ACCESS_KEY_ID='nobody', AWS_SECRET_ACCESS_KEY='nothing', AWS_DEFAULT_REGION='us-east-1').items(): monkeypatch.setenv(k, v)
    boto3.client('s3').create_bucket(Bucket='imagesim-storage')
    yield boto3.client('s3')
    server.stop()

def test_a_delivery_in_a_bucket(bucket, root):
    for p in sorted(root.rglob('*')):
        if p.is_file(): bucket.upload_file(str(p), 'imagesim-storage', f'ard/{p.relative_to(root)}')
    s3 = 's3://imagesim-storage/ard'
    tiles, local = find_tiles(s3), find_tiles(root)
    assert [t.id for t in tiles]==[t.id for t in local] and all(t.etag and t.path.startswith(s3) for t in tiles)
    assert [len(find_tiles(f'{s3}/{sub}')) for sub in ('33', f'33/{C.quadkey}', '34')]==[3,2,1] and len(find_tiles(s3, zone=34))==1
    assert get_cog_path_from_chip(Chip(C.children(17)[0], A1), s3)==tiles[0].path
    a, b = tile_table(s3), tile_table(root)
    same = [c for c in TILE_COLUMNS if c not in ('etag','modified')]
    pd.testing.assert_frame_equal(a[same], b[same])
    write_tile_table(a, 's3://imagesim-storage/tiles.parquet')
    pd.testing.assert_frame_equal(read_tile_table('s3://imagesim-storage/tiles.parquet'), a)
    with pytest.raises(ImagesimError, match='s3://imagesim-storage/nothing'): find_tiles('s3://imagesim-storage/nothing')
    with pytest.raises(ImagesimError, match='no-such-bucket'): find_tiles('s3://no-such-bucket/ard')


# --- real data

@pytest.fixture(scope='module')
def catalogue(): return read_catalogue(SHARED/'open_data')

class TestReal:
    pytestmark = needs_shared

    def test_every_item_parses_and_lies_in_its_tile(self, catalogue):
        assert len(catalogue)==468 and catalogue.attrs['problems']==[] and catalogue.tile.is_unique
        n = 0
        for f in sorted((SHARED/'open_data').glob('*.geojson')):
            for i in json.loads(f.read_text())['features']:
                p = i['properties']
                c = Cell(p['utm_zone'], p['quadkey'])
                t, (left,bottom,right,top) = c.buffered(APRON_M), map(float, p['proj:bbox'].split(','))
                assert t.left<=left<right<=t.right and t.bottom<=bottom<top<=t.top
                assert p['proj:epsg']==c.epsg and p['grid:code']==f'MXRA-{c.id}' and in_grid(c)
                assert tile_path(p['visual'].split('/ard/')[0]+'/ard', c, p['datetime'][:10], p['catalog_id'])==p['visual']
                n += 1
        assert n==468

    def test_its_figures(self, catalogue):
        assert catalogue.groupby('zone').size().to_dict()=={32:139, 33:106, 34:186, 60:37}
        assert sorted(catalogue.event.unique())==['Emilia-Romagna-Italy-flooding-may23', 'Libya-Floods-Sept-2023', 'New-Zealand-Flooding23']
        assert round(catalogue.off_nadir.median())==23 and round((catalogue.valid_area_km2<5).mean(), 2)==.26 and round((catalogue.cloud_share>.1).mean(), 2)==.09
        assert round((catalogue.gsd_native>=.42).mean(), 2)==.87
        assert catalogue.data_share.between(0, 1).all() and catalogue.data_share.max()==1
        utm = [reproject(shapely.from_wkb(f), 4326, e).area/1e6 for f,e in zip(catalogue.footprint, catalogue.epsg)]
        assert np.abs(utm-catalogue.valid_area_km2).max()<.4 # the footprint is the data area, so shares measured on it are right

    def test_the_zone_edge(self, catalogue):
        event = catalogue[catalogue.event.str.startswith('Emilia')]
        cells = sorted({Cell.parse(c) for c in event.cell})
        area = lambda g: reproject(g, 4326, 32633).area/1e6
        west, east = (shapely.union_all([c.geometry_wgs84() for c in cells if c.zone==z]) for z in (32,33))
        assert round(area(west & east), 1)==pytest.approx(114.8, abs=.2)
        assert round(area((west-east) & shapely.box(12, 40, 20, 50)), 1)==pytest.approx(8.7, abs=.1)
        near = [c for c in cells if c.geometry_wgs84().bounds[0]<12.07 and c.geometry_wgs84().bounds[2]>11.93]
        places = [p for c in near for p in c.children(CHIP_LEVEL)]
        squares = reproject(np.array([p.geometry_wgs84() for p in places]), 4326, 32633)
        everything = shapely.union_all(squares).area
        for margin, gap, twice in ((0, 1.65, 1.72), (111, .29, 8.0)):
            serving = set(serving_cells(places, cells, margin))
            s = squares[[p in serving for p in places]]
            union = shapely.union_all(s).area
            assert (everything-union)/1e6==pytest.approx(gap, abs=.05) and (shapely.area(s).sum()-union)/1e6==pytest.approx(twice, abs=.1)
        assert len(places)-len(serving_cells(places, cells))==4704
        for e in ('Libya', 'New'):
            zones_ = catalogue[catalogue.event.str.startswith(e)].zone.unique()
            assert len(zones_)==1

    def test_banepa(self):
        root = SHARED/'banepa/ard'
        tiles = find_tiles(root)
        assert len(tiles)==1 and tiles[0].id=='Z45-031331122210_A0A0000000000001' and str(tiles[0].date)=='2021-01-01' and not tiles.problems
        lon, lat = tiles[0].cell.lonlat
        assert 85.4<lon<85.7 and 27.5<lat<27.8 # Banepa, Nepal
        rasterio = pytest.importorskip('rasterio')
        with rasterio.open(tiles[0].path) as f:
            assert tuple(f.bounds)==tuple(tiles[0].cell.buffered(APRON_M)) and f.crs.to_epsg()==tiles[0].cell.epsg and f.shape==(17408,17408)
        t = tile_table(root)
        assert list(t.source)==['files'] and t['size'][0]==3882180 and t.date[0]=='2021-01-01' and t.cloud_share.isna().all()
        assert get_cog_path_from_chip(Chip(tiles[0].cell.children(17)[500], 'A0A0000000000001'), root)==tiles[0].path
