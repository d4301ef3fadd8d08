"""Where pixels land, which acquisition they come from, what broken, vanished and odd tiles cost, and what map programs are told"""
import io, math, os, re, shutil, subprocess, sys, threading
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from xml.etree import ElementTree

import mercantile, numpy as np, pytest, rasterio
from hypothesis import given, settings, strategies as st
from PIL import Image
from pyproj import Transformer
from rasterio.transform import from_origin
from rasterio.windows import Window
pytest.importorskip('rio_tiler', reason='the peer that pixels are compared with')
from rio_tiler.io import Reader

from conftest import ROOT
from imagesim.ard import Cell, tile_path, write_tile_table, tile_table
from imagesim.infra import CorruptError, InputError, MissingError, list_files, sync, write_json
from imagesim.synth import ArdWriter
from imagesim.mosaic import (MAX_ZOOM, Mosaic, build_overviews, check_selection, check_xyz, score_acquisition, tile_json, tile_matrix, tms_layer, tms_row, tms_service,
    wmts_capabilities, xyz_at, xyz_bounds, _warp, _under, zone_pixels)

pytestmark = pytest.mark.filterwarnings('ignore::rasterio.errors.NotGeoreferencedWarning')
HOME, GSD = 'Z33-031311023120', 5000/16384

@lru_cache
def soft(n, seed=0, low=60, high=235):
    "A picture without sharp edges, (3, n, n)"
    small = np.random.default_rng(seed).integers(low, high, (n//64,n//64,3), dtype='u1')
    return np.moveaxis(np.asarray(Image.fromarray(small).resize((n,n), Image.BICUBIC)), -1, 0)

def paint(ard, cell=HOME, cat='A1', day='2021-05-01', px=None, at=(10,10), seen=None, cloud=None, off_nadir=10., overviews=True):
    "Write a tile as the provider does, empty but for `px` (3, n, n), whose corner is at internal tile `at` (row, column), with its STAC item"
    c = Cell.parse(cell)
    path = Path(tile_path(ard, c, day, cat))
    path.parent.mkdir(parents=True, exist_ok=True)
    px = soft(2048) if px is None else px
    n = px.shape[1]//512
    seen = np.ones(px.shape[1:],bool) if seen is None else seen
    w = ArdWriter(c, [(at[1]+i,at[0]+j) for i in range(n) for j in range(n)], sparse=True)
    if not overviews: w.due = {}
    for j in range(n):
        for i in range(n): w.put(at[1]+i, at[0]+j, np.moveaxis(px[:, 512*j:512*j+512, 512*i:512*i+512], 0, -1), seen[512*j:512*j+512, 512*i:512*i+512])
    w.write(path)
    if cloud is not None:
        write_json(str(path).replace('-visual.tif','.json'), dict(type='Feature', geometry=None, properties={'datetime':f'{day}T10:00:00Z', 'catalog_id':cat, 'view:off_nadir':off_nadir, 'tile:clouds_percent':cloud, 'platform':'WV02'}))
    return str(path)

def paint_odd(ard, cell=HOME, cat='A1', day='2021-05-01', px=None, at=(10,10), bands=3, compress='deflate', gsd=GSD, size=17408, east=0., south=0., mask=True, dtype='uint8', **extra):
    "Write a tile otherwise than the provider does: no overviews, and whatever else is asked for"
    c = Cell.parse(cell)
    path = Path(tile_path(ard, c, day, cat))
    path.parent.mkdir(parents=True, exist_ok=True)
    px = soft(2048) if px is None else px
    n, apron = px.shape[1], (size*gsd-5000)/2
    w = Window(512*at[1], 512*at[0], n, n)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, 'w', driver='GTiff', width=size, height=size, count=bands, dtype=dtype, crs=f'EPSG:{c.epsg}',
            transform=from_origin(c.bounds.left-apron+east, c.bounds.top+apron-south, gsd, gsd), tiled=True, blockxsize=512, blockysize=512, compress=compress, SPARSE_OK=True, **extra) as d:
        d.write(px[:bands].astype(dtype), window=w)
        if mask: d.write_mask(np.full((n,n),True), window=w)
    return str(path)

def middle(cell=HOME, at=(10,10), n=2048):
    "The position of the middle of what `paint` painted"
    c = Cell.parse(cell)
    e, no = c.bounds.left-156.25+(512*at[1]+n/2)*GSD, c.bounds.top+156.25-(512*at[0]+n/2)*GSD
    return Transformer.from_crs(c.epsg, 4326, always_xy=True).transform(e, no)

def at(lonlat, z): return tuple(int(v) for v in xyz_at(*lonlat, z))

def shift(a, b):
    "How far picture `a` lies from `b`, in pixels (columns, rows), to a fraction"
    w = np.hanning(a.shape[0])[:,None]*np.hanning(a.shape[1])
    c = np.fft.ifft2(np.fft.fft2((a-a.mean())*w)*np.conj(np.fft.fft2((b-b.mean())*w))).real
    r, k = np.unravel_index(c.argmax(), c.shape)
    peak = lambda l, m, h: .5*(l-h)/(l-2*m+h)
    n, m = c.shape
    dy, dx = r+peak(c[r-1,k], c[r,k], c[(r+1)%n,k]), k+peak(c[r,k-1], c[r,k], c[r,(k+1)%m])
    return (dx+m/2)%m-m/2, (dy+n/2)%n-n/2

def rio(path, x, y, z, size=256):
    with Reader(path) as r: t = r.tile(x, y, z, tilesize=size, resampling_method='bilinear', reproject_method='bilinear')
    return np.moveaxis(t.data, 0, -1), t.mask>0

def image(tile): return np.asarray(Image.open(io.BytesIO(tile.data)).convert('RGBA'))

@pytest.fixture(scope='module')
def town(tmp_path_factory):
    "A town of 4 x 4 places on two dates"
    from imagesim.synth import make_delivery
    return make_delivery(tmp_path_factory.mktemp('town'), size=4, dates=2, seed=3)

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "One cell, two acquisitions: A1 is clear and lacks its right half, B2 is cloudy and whole"
    ard = tmp_path_factory.mktemp('two')/'ard'
    seen = np.ones((2048,2048),bool); seen[:,1100:] = False
    paint(ard, cat='A1', day='2020-03-01', px=np.full((3,2048,2048),200,'u1'), seen=seen, cloud=0)
    paint(ard, cat='B2', day='2022-03-01', px=np.full((3,2048,2048),90,'u1'), cloud=40)
    return str(ard)

# where a pixel lands

@pytest.mark.parametrize('cell', ['Z33-031311023120', 'Z34-211111103010', Cell.at(178.9,-16.5,12).id, Cell.at(-177.1,62.3,12).id])
def test_pixels_land_where_rio_tiler_puts_them(tmp_path, cell):
    path = paint(tmp_path/'ard', cell)
    m, where = Mosaic(tmp_path/'ard'), middle(cell)
    for z in (14,15,16,17,18,19,20):
        x, y, _ = mercantile.tile(*where, z)
        assert (x,y)==at(where, z)
        (px,seen), ours = rio(path, x, y, z), m.pixels(x, y, z)
        both = seen & (ours[...,3]==255)
        assert both.mean()>.03, z
        a, b = ours[...,1]*both*1., px[...,1]*both*1.
        d = np.abs(ours[...,:3].astype(int)-px)[both]
        assert max(map(abs, shift(a,b)))<(.25 if z<19 else .6), (z, shift(a,b)) # finer than the picture, there is little left to compare
        assert d.mean()<(16 if z<16 else 5), (z, d.mean()) # at low zooms the two smooth differently
        assert (seen!=(ours[...,3]>127)).mean()<.02

@pytest.mark.parametrize('cell', ['Z33-031311023120', 'Z34-211111103010'])
def test_a_corner_in_the_picture_lands_at_its_longitude_and_latitude(tmp_path, cell):
    "White begins 700 pixels from the painted square's corner, east and south: no other program is asked"
    px = np.full((3,2048,2048), 40, 'u1'); px[:,700:,700:] = 230
    paint(tmp_path/'ard', cell, px=px, at=(8,8))
    c, m = Cell.parse(cell), Mosaic(tmp_path/'ard')
    e, n = c.bounds.left-156.25+(512*8+700)*GSD, c.bounds.top+156.25-(512*8+700)*GSD
    lonlat = Transformer.from_crs(c.epsg, 4326, always_xy=True).transform(e, n)
    for z in (15,16,17,18,19):
        fx, fy = xyz_at(*lonlat, z)
        g = m.pixels(int(fx), int(fy), z, size=512)[...,1].astype(float)
        col, row = (fx%1)*512, (fy%1)*512
        if not (60<col<452 and 60<row<452): continue
        # along a row that runs through white, 40 pixels below the corner, the step from 40 to 230 is where the edge is; the grid is turned by the convergence of the meridians
        lon2, lat2 = Transformer.from_crs(c.epsg, 4326, always_xy=True).transform(e, n-40*math.cos(math.radians(lonlat[1]))*156543/2**z/2)
        r, want = xyz_at(lon2, lat2, z)[1]%1*512, xyz_at(lon2, lat2, z)[0]%1*512
        line = g[int(r)]
        edge = np.interp(135, line[int(want)-6:int(want)+7], np.arange(int(want)-6, int(want)+7)+.5)
        assert abs(edge-want)<1, (z, edge, want)

def test_town_agrees_with_rio_tiler(town):
    m = Mosaic(Path(town.root)/'ard')
    a = m.acquisitions[1]
    path = next(r.path for r in m.rows if r.catalog_id==a.catalog_id)
    lon, lat = town.read_places().geometry.union_all().centroid.coords[0]
    for z in (15,16,17,18):
        x, y = at((lon-.0005,lat), z)
        (px,seen), ours = rio(path, x, y, z), m.pixels(x, y, z, catalog_id=a.catalog_id)
        both = (seen & (ours[...,3]==255))[...,None]
        assert both.mean()>.05
        assert max(map(abs, shift((ours[...,:3]*both).mean(2), (px*both).mean(2))))<.25

def test_512_is_256_in_finer_pixels(two):
    m, where = Mosaic(two), middle()
    x, y = at(where, 16)
    fine = m.pixels(x, y, 16, size=512)
    four = np.block([[[m.pixels(2*x+i, 2*y+j, 17)] for i in (0,1)] for j in (0,1)])
    off = np.abs(fine.astype(int)-four).max(axis=2)
    assert fine.any() and (off>3).mean()<.005

@settings(max_examples=60, deadline=None)
@given(st.integers(1,60), st.floats(-79,83.5), st.floats(-3.05,3.05), st.integers(4,22), st.sampled_from([256,512]))
def test_the_straight_pieces_stay_within_a_tenth_of_a_pixel(zone, lat, off, z, size):
    lon = ((6*zone-183+off)+180)%360-180
    x, y = at((lon,lat), z)
    box = (0,size,0,size)
    if z<8: # as the mosaic does, only near the cells
        fx, fy = xyz_at(lon, lat, z)
        r, c = int(fy%1*size), int(fx%1*size)
        box = max(0,r-8), min(size,r+8), max(0,c-8), min(size,c+8)
    w = _warp(zone, x, y, z, size, box)
    assert sum(p.rows*p.cols for p in w.pieces)==(box[1]-box[0])*(box[3]-box[2])
    for p in w.pieces:
        rr, cc = np.meshgrid(np.linspace(0,p.rows,7), np.linspace(0,p.cols,7), indexing='ij')
        px, py = zone_pixels(zone, (x+(p.col+cc)/size)/2**z, (y+(p.row+rr)/size)/2**z)
        x0,xc,xr,y0,yc,yr = p.to
        assert np.hypot(x0+xc*cc+xr*rr-px, y0+yc*cc+yr*rr-py).max()<.15*w.scale

# addresses

@given(st.integers(0,MAX_ZOOM), st.data())
def test_bounds_are_mercantiles(z, data):
    x, y = (data.draw(st.integers(0,2**z-1)) for _ in 'xy')
    b, want = xyz_bounds(x, y, z), mercantile.bounds(x, y, z)
    np.testing.assert_allclose(b, want, atol=1e-9)
    lon, lat = (b.west+b.east)/2, (b.south+b.north)/2
    fx, fy = xyz_at(lon, lat, z)
    assert (int(fx),int(fy))==(x,y)
    assert tms_row(z, tms_row(z, y))==y

@pytest.mark.parametrize('x,y,z,says', [(0,0,-1,'no zoom -1'), (0,0,25,'0 to 24'), (4,0,2,'outside the world'), (0,-1,2,'0 to 3'), (.5,0,2,'whole numbers'), (True,0,2,'whole numbers')])
def test_addresses_outside_the_world(two, x, y, z, says):
    with pytest.raises(InputError, match=says): Mosaic(two).tile(x, y, z)

def test_rows_from_the_south_are_mirrored():
    assert [tms_row(2,y) for y in range(4)]==[3,2,1,0]
    with pytest.raises(InputError): tms_row(2, 4)

# what lies on top

def test_a_later_acquisition_fills_only_what_is_missing(two):
    m, where = Mosaic(two), middle()
    x, y = at(where, 17)
    px = m.pixels(x, y, 17)
    assert (px[...,3]==255).all() and (np.isin(px[...,1], range(85,95))|np.isin(px[...,1], range(195,205))).mean()>.98 # one or the other, but for the seam
    assert set(m.tile(x, y, 17).sources)=={'A1','B2'} and m.tile(x, y, 17).sources[0]=='A1'
    assert abs(m.pixels(*at(middle(n=1000),18), 18)[...,1].astype(int)-200).max()<5
    assert abs(m.pixels(x, y, 17, select='newest')[...,1].astype(int)-90).max()<5

@pytest.mark.parametrize('how,first', [({}, 'A1'), (dict(select='newest'),'B2'), (dict(select='oldest'),'A1'), (dict(on='2022-03-01'),'B2'), (dict(until='2022-02-28'),'A1'), (dict(until='2022-03-01'),'B2'),
                                       (dict(until='2022-03-01', select='best'),'A1'), (dict(catalog_id='B2'),'B2'), (dict(on='2021-01-01'),None), (dict(until='2019-12-31'),None)])
def test_selections(two, how, first):
    t = Mosaic(two).tile(*at(middle(n=1000), 18), 18, **how)
    assert (t.sources[:1]==(first,)) if first else (t.empty and t.kind=='missing' and not t.sources)

@pytest.mark.parametrize('how,says', [(dict(select='prettiest'),'known: best|did you mean'), (dict(on='yesterday'),'not a day'), (dict(on='2021-01-01',until='2021-01-01'),'both given'),
                                      (dict(catalog_id='A2'),'known: A1, B2'), (dict(catalog_id='../x'),'not safe'), (dict(size=300),'256 or 512'), (dict(format='gif'),'known: '), (dict(select=['best']),'did you mean')])
def test_bad_requests_say_what_is_possible(two, how, says):
    with pytest.raises(InputError, match=says): Mosaic(two).tile(0, 0, 0, **how)

def test_no_checkerboard(tmp_path):
    "Cell by cell the clearer one alternates; in the mosaic one acquisition lies on top everywhere"
    base, cells = Cell.parse(HOME), []
    for i in range(4):
        c = Cell.from_xy(33, base.x+i, base.y, 12)
        cells.append(c)
        for cat,cloud,grey in (('A1', 10 if i%2 else 0, 200), ('B2', 0 if i%2 else 12, 90)): paint(tmp_path/'ard', c, cat, px=np.full((3,512,512),grey,'u1'), at=(16,16), cloud=cloud)
    m = Mosaic(tmp_path/'ard')
    tops = [m.tile(*at(middle(c, (16,16), 1024), 18), 18).sources[0] for c in cells]
    assert tops==['A1']*4
    assert [a.clear for a in m.acquisitions]==pytest.approx([.95,.94])

def test_regions_are_judged_apart(tmp_path):
    "The same two acquisitions, in two towns 200 km from each other: each town takes what is clear there"
    base = Cell.parse(HOME)
    for i,(a,b) in enumerate([(0,30),(30,0)]):
        c = Cell.from_xy(33, base.x+40*i, base.y, 12)
        for cat,cloud,grey in (('A1',a,200), ('B2',b,90)): paint(tmp_path/'ard', c, cat, px=np.full((3,1024,1024),grey,'u1'), at=(16,16), cloud=cloud)
        assert Mosaic(tmp_path/'ard').tile(*at(middle(c, (16,16), 1024), 18), 18).sources[0]==('A1','B2')[i]

def test_the_score_prefers_clear_upright_new_and_large():
    base = dict(clear=.9, off_nadir=20, years=2, share=.5)
    for better in (dict(clear=1.), dict(off_nadir=5), dict(years=0), dict(share=1.)): assert score_acquisition(**base|better)>score_acquisition(**base)
    assert score_acquisition(.95,30,0,1)<score_acquisition(1.,15,3,1)

# zones

EDGE_LON, EDGE_LAT = 18.0, 45.02

def edge_cells():
    "Cells of zones 33 and 34 over the same ground at 18 degrees east, and a place of each that both show"
    return Cell.at(EDGE_LON-.0001, EDGE_LAT, 12, zone=33), Cell.at(EDGE_LON+.0001, EDGE_LAT, 12, zone=34)

def test_at_a_zone_edge_the_zone_that_owns_the_ground_shows_it(tmp_path):
    a, b = edge_cells()
    for c,grey in ((a,200),(b,90)):
        e, n = Transformer.from_crs(4326, c.epsg, always_xy=True).transform(EDGE_LON, EDGE_LAT)
        col, row = (int((v+156.25)//156.25) for v in (e-c.bounds.left, c.bounds.top-n))
        paint(tmp_path/'ard', c, f'C{c.zone}', px=np.full((3,3584,3584),grey,'u1'), at=(max(0,min(27,row-3)), max(0,min(27,col-3))))
    m = Mosaic(tmp_path/'ard')
    z = 17
    fx, fy = xyz_at(EDGE_LON, EDGE_LAT, z)
    px = m.pixels(int(fx), int(fy), z)
    col = round(fx%1*256)
    assert (px[...,3]==255).all()
    if col>3: assert abs(px[:,:col-2,1].astype(int)-200).max()<4
    if col<253: assert abs(px[:,col+2:,1].astype(int)-90).max()<4
    west, east = m.pixels(int(fx)-1, int(fy), z), m.pixels(int(fx)+1, int(fy), z)
    assert abs(west[...,1].astype(int)-200).max()<4 and abs(east[...,1].astype(int)-90).max()<4
    for gone,left,grey in ((a,b,90),(b,a,200)): # where only the neighbour's tile was delivered, it shows this ground too
        root = tmp_path/f'only{left.zone}'
        shutil.copytree(tmp_path/'ard'/f'{left.zone:02d}', root/f'{left.zone:02d}')
        px = Mosaic(root).pixels(int(fx)-1 if gone==a else int(fx)+1, int(fy), z)
        assert (px[...,3]==255).mean()>.5 and abs(px[...,1][px[...,3]==255].astype(int)-grey).max()<4

def test_across_the_antimeridian(tmp_path):
    west, east = Cell.at(179.99, -16.5, 12, zone=60), Cell.at(-179.99, -16.5, 12, zone=1)
    for c in (west,east): paint(tmp_path/'ard', c, f'C{c.zone}', px=np.full((3,4096,4096),150,'u1'), at=(12,12))
    m = Mosaic(tmp_path/'ard')
    b = m.bounds
    assert b.west>179 and b.east<-179 and b.south<-16.4<b.north+.2
    for c in (west,east):
        lonlat = middle(c, (12,12), 4096)
        assert (m.pixels(*at(lonlat,17), 17)[...,3]==255).mean()>.9
    edge = Mosaic(tmp_path/'ard').tile(0, at((-179.999,-16.5),12)[1], 12)
    assert edge.kind=='imagery'
    assert tile_json(m,'x')['bounds'][::2]==[-180,180] and abs(abs(tile_json(m,'x')['center'][0])-180)<.2

# odd tiles

def test_a_panchromatic_tile_shows_as_grey(tmp_path):
    paint_odd(tmp_path/'ard', bands=1)
    m, where = Mosaic(tmp_path/'ard'), middle()
    for z in (16,17,18):
        p = m.pixels(*at(where,z), z)
        seen = p[...,3]==255
        assert seen.any() and (np.ptp(p[seen][:,:3], axis=1)==0).all()
    path = m.rows[0].path
    (a,_), b = rio(path, *at(where,17), 17), m.pixels(*at(where,17), 17)
    assert max(map(abs, shift(b[...,0]*1., a[...,0]*1.)))<.25 and not m.faults

def test_a_tile_off_the_grid_and_of_other_pixels_lies_right(tmp_path):
    path = paint_odd(tmp_path/'ard', gsd=.5, size=10240, east=7.3, south=3.1, at=(6,6))
    where = middle(at=(11,11))
    m = Mosaic(tmp_path/'ard')
    for z in (15,16,17,18):
        (px,seen), ours = rio(path, *at(where,z), z), m.pixels(*at(where,z), z)
        both = seen & (ours[...,3]==255)
        assert both.mean()>.3 and max(map(abs, shift(ours[...,1]*both*1., px[...,1]*both*1.)))<.3, z

@pytest.mark.parametrize('how', [dict(mask=False, bands=4, alpha='yes'), dict(mask=False, nodata=0, compress='lzw'), dict(compress='jpeg', photometric='rgb'), dict(compress='jpeg', photometric='ycbcr'), dict(compress='webp'), dict(bands=1, compress='jpeg')])
def test_other_ways_to_write_a_tile(tmp_path, how):
    px = np.concatenate([soft(2048), np.full((1,2048,2048),255,'u1')])
    path = paint_odd(tmp_path/'ard', px=px, **how)
    m, where = Mosaic(tmp_path/'ard'), middle()
    for z in (17,18):
        p, (want,seen) = m.pixels(*at(where,z), z), rio(path, *at(where,z), z)
        assert (p[...,3]==255).mean()>.9 and not m.faults
        assert np.abs(p[...,:3].astype(int)-want[...,:3]).mean()<4
    p = m.pixels(*at(where,16), 16)
    assert (p[...,3]==0).any() and (p[...,3]==255).any()

def test_16_bit_pixels_are_a_fault_and_not_a_picture(tmp_path):
    paint_odd(tmp_path/'ard', dtype='uint16')
    m = Mosaic(tmp_path/'ard')
    assert m.tile(*at(middle(),17), 17).empty
    assert 'uint16' in m.faults[0][1]

def test_tiles_without_overviews(tmp_path):
    "Nobody waits for a whole tile to be decoded: outlines, a reason, and `build_overviews` as the cure"
    paint_odd(tmp_path/'ard', px=np.full((3,2048,2048),150,'u1'), compress='jpeg', photometric='ycbcr')
    m, where = Mosaic(tmp_path/'ard'), middle()
    assert [m.tile(*at(where,z), z).kind for z in (11,12,13)]==['outlines']*3 and 'mosaic build' in m.faults[0][1]
    for z in (16,17,18): assert m.tile(*at(where,z), z).kind=='imagery'
    build_overviews(m, tmp_path/'o')
    m = Mosaic(tmp_path/'ard', overviews=tmp_path/'o')
    p = m.pixels(*at(where,13), 13)
    assert (p[...,3]==255).any() and abs(p[p[...,3]==255][:,:3].astype(int)-150).max()<5

# missing pixels

def test_no_fringe_where_the_picture_ends(tmp_path):
    "A bright picture with a slanted edge: JPEG draws grey along it, and a map would show a dark line"
    y, x = np.mgrid[:2048,:2048]
    seen = x+.37*y<1400
    paint(tmp_path/'ard', px=np.stack([np.full((2048,2048),v,'u1') for v in (240,60,200)]), seen=seen)
    m, where = Mosaic(tmp_path/'ard'), middle(n=2044)
    worst = 0
    for z in (16,17,18,19):
        p = m.pixels(*at(where,z), z).astype(int)
        on = p[...,3]==255
        assert on.any() and (p[...,3]==0).any()
        worst = max(worst, np.abs(p[on][:,:3]-np.array([240,60,200])).max())
    assert worst<40 # without care it is above 100: see below
    d = np.stack(rio(m.rows[0].path, *at(where,18), 18)[0:1])[0].astype(int)
    s = rio(m.rows[0].path, *at(where,18), 18)[1]
    assert np.abs(d[s]-np.array([240,60,200])).max()>60

def test_real_mask_is_respected(shared):
    ard = shared/'banepa'/'ard'
    m = Mosaic(ard)
    path, b = m.rows[0].path, m.bounds
    with rasterio.open(path) as d:
        seen = d.dataset_mask(out_shape=(544,544))>0
        r, c = (np.argwhere(seen).mean(0)*32).astype(int)
        lon, lat = Transformer.from_crs(d.crs, 4326, always_xy=True).transform(*(d.transform*(int(c),int(r))))
    for z in (15,16,17):
        x, y = at((lon,lat), z)
        (px,there), ours = rio(path, x, y, z), m.pixels(x, y, z)
        assert (there!=(ours[...,3]>127)).mean()<.02
        both = there & (ours[...,3]==255)
        if both.any(): assert np.abs(ours[...,:3].astype(int)-px)[both].mean()<8

@pytest.mark.parametrize('size', [256,512])
def test_formats(two, size):
    m, where = Mosaic(two), middle()
    x, y = at(where, 15)
    for fmt,kind in dict(png='image/png', webp='image/webp', jpg='image/jpeg').items():
        t = m.tile(x, y, 15, size=size, format=fmt)
        p = image(t)
        assert t.media_type==kind and p.shape==(size,size,4) and not t.empty and t.kind=='imagery'
        if fmt=='jpg': assert abs(p[0,0,:3].astype(int)-128).max()<6
        else: assert p[0,0,3]==0 and (p[...,3]==255).any()
        e = m.tile(0, 0, 15, size=size, format=fmt)
        assert e.empty and image(e).shape==(size,size,4) and (image(e)[...,3]==(255 if fmt=='jpg' else 0)).all()
    assert m.tile(*at(middle(n=1000),18), 18, format='auto').media_type=='image/jpeg' and m.tile(x, y, 15, format='auto').media_type=='image/webp'

def test_laying_under_is_exact_at_the_ends():
    rng = np.random.default_rng(0)
    new = (rng.integers(0,2**24,(50,50),dtype='u4'))|np.uint32(0xff000000)
    assert (_under(np.zeros((50,50),'u4'), new)==new).all() and (_under(new, new^np.uint32(0xffffff))==new).all()

# faults

def test_a_truncated_tile_costs_itself_only(two, tmp_path):
    ard = shutil.copytree(two, tmp_path/'ard')
    m = Mosaic(ard)
    path = next(r.path for r in m.rows if r.catalog_id=='A1')
    os.truncate(path, 9000)
    m = Mosaic(ard)
    t = m.tile(*at(middle(n=1000),18), 18)
    assert t.faulty and not m.tile(0, 0, 17).faulty and t.sources==('B2',) and [f[0].rpartition('_')[2] for f in m.faults]==['A1'] and 'cut off or damaged' in m.faults[0][1]
    assert str(tmp_path) not in m.faults[0][1]

@pytest.mark.parametrize('garbage', [b'', b'not a tiff at all'*100, b'II*\0'+b'\xff'*400])
def test_garbage_instead_of_a_tile(two, tmp_path, garbage):
    ard = shutil.copytree(two, tmp_path/'ard')
    Path(next(r.path for r in Mosaic(ard).rows if r.catalog_id=='A1')).write_bytes(garbage)
    m = Mosaic(ard)
    assert m.tile(*at(middle(n=1000),18), 18).sources==('B2',) and len(m.faults)==1 and str(tmp_path) not in str(m.faults)

def test_a_damaged_internal_tile_costs_this_square_only(two, tmp_path):
    from imagesim.read import read_tiff
    ard = shutil.copytree(two, tmp_path/'ard')
    path = next(r.path for r in Mosaic(ard).rows if r.catalog_id=='A1')
    im = read_tiff(path)[0]
    with open(path,'r+b') as f: f.seek(int(im.offsets[10,10])); f.write(b'\0'*64)
    m = Mosaic(ard)
    px = m.pixels(*at(middle(n=512),19), 19)
    assert abs(px[...,1].astype(int)-90).max()<5 and 'internal tile in row 10, column 10' in m.faults[0][1]
    lower = m.pixels(*at(middle(at=(11,10), n=512),19), 19)
    assert abs(lower[...,1].astype(int)-200).max()<5

def test_a_tile_that_vanishes_or_changes_while_the_map_is_up(two, tmp_path):
    ard = shutil.copytree(two, tmp_path/'ard')
    m = Mosaic(ard)
    spot = *at(middle(n=1000),18), 18
    assert m.tile(*spot).sources==('A1',) and not m.tile(*spot).faulty
    path = next(r.path for r in m.rows if r.catalog_id=='A1')
    os.rename(path, tmp_path/'away')
    assert m.tile(*spot).sources==('B2',) and 'nothing there' in m.faults[0][1]
    shutil.copy(tmp_path/'away', path)
    for k in m.bad: m.bad[k] = (m.bad[k][0], -1e9) # as if the pause before the next attempt were over
    assert m.tile(*spot).sources==('A1',) and not m.faults
    paint(ard, cat='A1', day='2020-03-01', px=np.full((3,2048,2048),20,'u1'))
    assert m.pixels(*spot)[...,1].mean()<30 # other pixels under the same path

def test_nothing_to_show(tmp_path):
    with pytest.raises((InputError,MissingError)): Mosaic(tmp_path/'nowhere')
    (tmp_path/'empty').mkdir()
    with pytest.raises(InputError, match='not a delivery'): Mosaic(tmp_path/'empty')

# many at once, and what it costs

def test_threads_draw_the_same_bytes(town):
    ard = Path(town.root)/'ard'
    lon, lat = town.read_places().geometry.union_all().centroid.coords[0]
    tiles = [(x+i,y+j,z) for z in (14,16,17,18) for x,y in [at((lon,lat),z)] for i in (-1,0,1) for j in (-1,0,1)]
    alone = Mosaic(ard)
    want = {t:alone.tile(*t, format='webp') for t in tiles}
    m = Mosaic(ard, cache=8, open_files=2) # so small that threads take things from each other
    with ThreadPoolExecutor(8) as pool: got = list(pool.map(lambda t: m.tile(*t, format='webp'), tiles*3))
    assert all(g==want[t] for t,g in zip(tiles*3, got))
    assert m.cache.size<=8*2**20 and len(m.opened)<=2 and not m.cache.waiting
    assert m.cache.size==sum(200+getattr(v,'nbytes',0) for v in m.cache.data.values())

def test_open_files_are_closed_again(two):
    m = Mosaic(two)
    before = len(os.listdir('/proc/self/fd'))
    m.tile(*at(middle(),16), 16)
    assert len(os.listdir('/proc/self/fd'))>before
    m.close()
    assert len(os.listdir('/proc/self/fd'))==before
    assert m.tile(*at(middle(),16), 16).kind=='imagery' # and opened anew when asked

def test_a_failure_while_two_wait_for_the_same_block():
    from imagesim.mosaic import _Cache
    c, gate, out = _Cache(1000), threading.Event(), []
    def load(keys): gate.wait(5); raise CorruptError('broken')
    def ask():
        try: c.get(['a'], load)
        except CorruptError as e: out.append(str(e))
    ts = [threading.Thread(target=ask) for _ in range(3)]
    for t in ts: t.start()
    gate.set()
    for t in ts: t.join(5)
    assert out==['broken']*3 and not c.waiting and c.get(['a'], lambda k: [None])==[None]

# buckets and tables

def test_a_bucket_gives_the_same_map(two, bucket, tmp_path):
    sync(two, f'{bucket}/ard')
    here, there = Mosaic(two), Mosaic(f'{bucket}/ard')
    for z in (13,17,18):
        t = *at(middle(n=1000),z), z
        assert here.tile(*t).data==there.tile(*t).data
    assert there.acquisitions==here.acquisitions and not there.faults
    s = build_overviews(there, f'{bucket}/mosaic/x')
    assert not s.failed and s.done
    m = Mosaic(f'{bucket}/ard', overviews=f'{bucket}/mosaic/x')
    assert m.stale==0 and m.tile(*at(middle(),11), 11).kind=='imagery'
    again = build_overviews(there, f'{bucket}/mosaic/x')
    assert again.done==0 and again.skipped==s.done
    import s3fs
    from imagesim.infra import remove_file
    remove_file(next(r.path for r in m.rows if r.catalog_id=='A1'))
    assert Mosaic(f'{bucket}/ard', table=tile_table(two)).tile(*at(middle(n=1000),18), 18).sources==('B2',)

def test_a_tile_table_saves_looking(two, tmp_path):
    write_tile_table(tile_table(two), tmp_path/'tiles.parquet')
    m = Mosaic(two, table=tmp_path/'tiles.parquet')
    assert m.version==Mosaic(two).version and m.tile(*at(middle(),17), 17).sources
    t = tile_table(two)
    t['path'] = [f'{two}/{p}' for p in t.path]
    assert Mosaic(t).tile(*at(middle(),17), 17).sources

def test_the_version_tells_one_state_from_another(two, tmp_path):
    ard = shutil.copytree(two, tmp_path/'ard')
    v = Mosaic(ard).version
    assert re.fullmatch('[0-9a-f]{16}', v) and Mosaic(ard).version==v
    build_overviews(ard, tmp_path/'o')
    w = Mosaic(ard, overviews=tmp_path/'o').version
    assert w!=v
    paint(ard, cat='C3', day='2023-01-01', px=np.full((3,512,512),5,'u1'))
    assert Mosaic(ard).version not in (v,w)

def test_clear_shares_from_the_chip_index(tmp_path):
    from imagesim.chip import chip_ard
    paint(tmp_path/'ard')
    chip_ard(tmp_path/'ard', tmp_path/'chips', virtual=True)
    assert Mosaic(tmp_path/'ard', chips=tmp_path/'chips').acquisitions[0].clear in (None, 1.)

# overviews

def test_overviews_show_what_the_tiles_show(town, tmp_path):
    ard = Path(town.root)/'ard'
    s = build_overviews(ard, tmp_path/'o')
    assert not s.failed and s.extra['cells']==1
    plain, m = Mosaic(ard), Mosaic(ard, overviews=tmp_path/'o')
    assert m.stale==0 and not m.problems
    lon, lat = town.read_places().geometry.union_all().centroid.coords[0]
    for z in (10,11,12,13):
        a, b = plain.pixels(*at((lon,lat),z), z), m.pixels(*at((lon,lat),z), z)
        on = (a[...,3]>200)&(b[...,3]>200)
        assert on.any() and np.abs(a.astype(int)-b)[on].mean()<10, z
        assert ((a[...,3]>127)!=(b[...,3]>127)).sum()<=20+.5*on.sum() # edges
    opened = len(m.opened)
    for z in range(7,12): assert m.tile(*at((lon,lat),z), z).kind=='imagery'
    assert len(m.opened)==opened # no tile is read for them
    assert m.tile(*at((lon,lat),11), 11, until=m.dates[0]).sources==(m.acquisitions[0].catalog_id,)

def test_overviews_are_resumed_and_grow(two, tmp_path):
    ard, o = shutil.copytree(two, tmp_path/'ard'), tmp_path/'o'
    s = build_overviews(ard, o)
    files = {f.path:f.modified for f in list_files(o,'.webp')}
    some = sorted(files)[::2]
    for f in some: os.unlink(f) # as after a killed run
    r = build_overviews(ard, o)
    assert r.done==len(some) and {f.path for f in list_files(o,'.webp')}==set(files)
    assert all(f.modified==files[f.path] for f in list_files(o,'.webp') if f.path not in some)
    paint(ard, cat='C3', day='2023-01-01', cloud=0)
    grown = build_overviews(ard, o)
    assert grown.done==s.done//2 and grown.skipped==s.done
    paint(ard, cat='C3', day='2023-01-01', px=np.full((3,512,512),5,'u1'), cloud=0)
    assert Mosaic(ard, overviews=o).stale==1
    again = build_overviews(ard, o)
    assert again.done==s.done//2 and len(list_files(o,'.webp'))==len(files)*3//2 # the old squares are gone
    shutil.rmtree(ard/'33'/'031311023120'/'2023-01-01')
    build_overviews(ard, o)
    assert {f.path for f in list_files(o,'.webp')}==set(files)

def test_overviews_survive_a_kill(two, tmp_path):
    "kill -9 after the third square: what is there is whole, the rest is made by the next call, and the end is that of an undisturbed run"
    code = f"""
import os, signal
from imagesim import mosaic
real, count = mosaic.write_bytes, []
def write(path, data):
    real(path, data); count.append(1)
    if len(count)==3: os.kill(os.getpid(), signal.SIGKILL)
mosaic.write_bytes = write
mosaic.build_overviews({str(two)!r}, {str(tmp_path/'killed')!r})
"""
    p = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True)
    assert p.returncode==-9, p.stderr
    made = {f.name:f.read_bytes() for f in (tmp_path/'killed').rglob('*.webp')}
    assert len(made)==3 and not list((tmp_path/'killed').glob('*.json'))
    s = build_overviews(two, tmp_path/'killed')
    whole = build_overviews(two, tmp_path/'whole')
    content = lambda folder: {str(f.relative_to(folder)):f.read_bytes() for f in folder.rglob('*') if f.is_file()}
    assert (s.skipped, s.done)==(3, whole.done-3) and content(tmp_path/'killed')==content(tmp_path/'whole')
    assert all(made[f.name]==f.read_bytes() for f in (tmp_path/'killed').rglob('*.webp') if f.name in made)

def test_overviews_with_a_corrupt_tile(two, tmp_path):
    ard, o = shutil.copytree(two, tmp_path/'ard'), tmp_path/'o'
    os.truncate(next(r.path for r in Mosaic(ard).rows if r.catalog_id=='A1'), 9000)
    s = build_overviews(ard, o)
    assert s.failed==1 and s.exit_code==1 and 'A1' in s.failures[0][0]
    assert Mosaic(ard, overviews=o).tile(*at(middle(),10), 10).sources==('B2',)

def test_a_damaged_overview_costs_its_layer(two, tmp_path):
    o = tmp_path/'o'
    build_overviews(two, o)
    for f in list_files(o,'.webp'):
        if '_A1/' in f.path: Path(f.path).write_bytes(b'RIFF....')
    m = Mosaic(two, overviews=o)
    assert m.tile(*at(middle(),10), 10).sources==('B2',) and m.faults and str(tmp_path) not in str(m.faults)
    (o/'overviews.json').write_text('{"format":1,"squares":{"33/x":{"../../etc":"passwd"}}}')
    Mosaic(two, overviews=o) # of an acquisition that is not there: not looked at
    key = m.rows[0].key
    for bad in ('{"format":1,"squares":{"33/%s":{"../../etc":"passwd"}}}'%key, '{"format":9}', '[]', '{'):
        (o/'overviews.json').write_text(bad)
        with pytest.raises(CorruptError): Mosaic(two, overviews=o)

def test_missing_overviews_are_a_remark(two, tmp_path):
    assert 'mosaic build' in Mosaic(two, overviews=tmp_path/'none').problems[-1][1]

def test_outlines_where_too_much_would_be_opened(two):
    m = Mosaic(two, limit=1)
    t = m.tile(*at(middle(),11), 11)
    p = image(t)
    assert t.kind=='outlines' and not t.empty and t.sources==() and 0<p[...,3].max()<255
    assert not m.opened
    assert Mosaic(two, limit=2).tile(*at(middle(),11), 11).kind=='imagery'

def test_one_acquisition_in_two_regions_keeps_to_its_own(tmp_path):
    base = Cell.parse(HOME)
    for i in (0,1):
        c = Cell.from_xy(33, base.x+10*i, base.y, 12)
        for cat,cloud,grey in (('A1',(0,30)[i],200), ('B2',(30,0)[i],90)): paint(tmp_path/'ard', c, cat, px=np.full((3,4096,4096),grey,'u1'), at=(8,8), cloud=cloud)
    build_overviews(tmp_path/'ard', tmp_path/'o')
    m = Mosaic(tmp_path/'ard', overviews=tmp_path/'o')
    for i in (0,1):
        lonlat = middle(Cell.from_xy(33, base.x+10*i, base.y, 12), (8,8), 4096)
        x, y = xyz_at(*lonlat, 8)
        g = m.pixels(int(x), int(y), 8)[int(y%1*256), int(x%1*256)]
        assert abs(int(g[1])-(200,90)[i])<12 and g[3]>150

# descriptions

def test_wmts_capabilities_describe_the_map_tiles(two):
    m = Mosaic(two)
    root = ElementTree.fromstring(wmts_capabilities(m, 'https://h/p/tiles/{z}/{x}/{y}.{ext}?v=1', title='A & <B>'))
    ns = dict(w='http://www.opengis.net/wmts/1.0', o='http://www.opengis.net/ows/1.1')
    assert root.tag.endswith('Capabilities') and root.get('version')=='1.0.0'
    sets = root.findall('w:Contents/w:TileMatrixSet', ns)
    assert [s.find('o:Identifier',ns).text for s in sets]==['WebMercatorQuad']
    assert sets[0].find('o:SupportedCRS',ns).text.endswith('EPSG::3857')
    for z,t in enumerate(sets[0].findall('w:TileMatrix',ns)):
        f = lambda k: t.find(k,ns).text
        assert f('o:Identifier')==str(z) and float(f('w:ScaleDenominator'))==pytest.approx(559082264.0287178/2**z, rel=1e-9)
        assert [float(v) for v in f('w:TopLeftCorner').split()]==pytest.approx([-20037508.3427892,20037508.3427892], abs=1e-5)
        assert (f('w:TileWidth'),f('w:TileHeight'),f('w:MatrixWidth'),f('w:MatrixHeight'))==('256','256',str(2**z),str(2**z))
    assert z==m.max_zoom
    layers = root.findall('w:Contents/w:Layer',ns)
    assert [l.find('o:Identifier',ns).text for l in layers]==['mosaic','until-2020-03-01','until-2022-03-01'] and layers[0].find('o:Title',ns).text=='A & <B>'
    low, high = ([float(v) for v in layers[0].find(f'o:WGS84BoundingBox/o:{k}Corner',ns).text.split()] for k in ('Lower','Upper'))
    assert [*low,*high]==pytest.approx(list(m.bounds), abs=1e-5)
    # what a client makes of the template is the same map tile as by XYZ: its corner, by the numbers of the matrix, is where mercantile says
    link = layers[1].find('w:ResourceURL',ns).get('template')
    z, (x,y) = 17, at(middle(),17)
    assert link.replace('{TileMatrix}',str(z)).replace('{TileCol}',str(x)).replace('{TileRow}',str(y))==f'https://h/p/tiles/{z}/{x}/{y}.png?v=1&until=2020-03-01'
    o = tile_matrix(z)
    span = o.scale_denominator*.00028*256
    box = mercantile.xy_bounds(x, y, z)
    assert (o.left+x*span, o.top-y*span)==pytest.approx((box.left,box.top), abs=1e-3)

def test_tms_rows_count_from_the_south(two):
    m = Mosaic(two)
    service = ElementTree.fromstring(tms_service('https://h/tms/1.0.0/mosaic', title='"x" & y'))
    entry = service.find('TileMaps/TileMap')
    assert (entry.get('profile'),entry.get('srs'),entry.get('title'))==('global-mercator','EPSG:3857','"x" & y')
    layer = ElementTree.fromstring(tms_layer(m, 'https://h/tms/1.0.0/'))
    origin, sets = layer.find('Origin'), layer.findall('TileSets/TileSet')
    ox, oy, box = float(origin.get('x')), float(origin.get('y')), {k:float(v) for k,v in layer.find('BoundingBox').items()}
    assert [int(s.get('order')) for s in sets]==list(range(m.max_zoom+1))
    z, (lon,lat) = 17, middle()
    upp = float(sets[z].get('units-per-pixel'))
    mx, my = Transformer.from_crs(4326, 3857, always_xy=True).transform(lon, lat)
    assert box['minx']<mx<box['maxx'] and box['miny']<my<box['maxy']
    col, row = int((mx-ox)/(256*upp)), int((my-oy)/(256*upp)) # as a TMS client counts
    assert (col, tms_row(z,row))==at((lon,lat), z)
    assert sets[z].get('href')==f'https://h/tms/1.0.0/{z}'

def test_tile_json(two):
    m = Mosaic(two, credits=['<b>Me</b>'])
    t = tile_json(m, 'tiles/{z}/{x}/{y}.webp')
    assert t['tilejson']=='3.0.0' and t['scheme']=='xyz' and t['tiles']==['tiles/{z}/{x}/{y}.webp'] and t['minzoom']==0 and t['maxzoom']==m.max_zoom
    assert '<b>' not in t['attribution'] and t['bounds'][0]<t['center'][0]<t['bounds'][2]

def test_max_zoom_is_about_native(two):
    m = Mosaic(two)
    lat = middle()[1]
    assert 156543*math.cos(math.radians(lat))/2**m.max_zoom<=GSD*1.2 and m.max_zoom<=20
