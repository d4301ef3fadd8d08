"""Chips against what rasterio and other decoders say; killed runs, two runs at once, damaged tiles, odd names, buckets"""
import io, json, os, shutil, signal, socket, subprocess, sys, time
from pathlib import Path

import numpy as np, pytest, rasterio
from PIL import Image
from pyproj import Transformer
from rasterio.io import MemoryFile
from rasterio.transform import from_origin
from rasterio.windows import Window

from imagesim.ard import Cell, get_cog_path_from_chip, parse_chip
from imagesim.chip import ChipWriter, GeoRef, chip_ard, chip_bounds, chip_names, clear_shares, cover_shares, fit_grid
from imagesim.infra import CorruptError, InputError, MissingError, StorageError, list_files, sync
from imagesim.read import ChipStore, find_chips, open_chip, read_chip_index, read_chips, read_tiff, splice_jpeg

pytestmark = pytest.mark.filterwarnings('ignore::rasterio.errors.NotGeoreferencedWarning')
CELL, CAT, DAY, GSD = 'Z33-031311023120', '10300100B3841C00', '2021-05-01', 5000/16384
ROOT = Path(__file__).resolve().parent.parent

def texture(n, bands=3, seed=0):
    "A soft, grainy picture (bands, n, n) without a single black pixel"
    rng = np.random.default_rng(seed)
    y,x = np.mgrid[:n,:n]/512
    hills = sum(np.sin(2*np.pi*(fx*x+fy*y)+p) for fx,fy,p in rng.uniform(-2,2,(5,3)))
    return np.clip(120+15*np.stack([hills*(i+1)/2 for i in range(bands)])+rng.normal(0,8,(1,n,n)), 30, 255).astype('u1')

def make_tile(ard, cell=CELL, day=DAY, catalog_id=CAT, at=(1,1), n=3, size=17408, compress='jpeg', bands=3, mask=True, missing=None, east=0., south=0., gsd=GSD, epsg=None,
              dtype='uint8', seed=0, zone_dir=None, **extra):
    "Write a sparse tile with `n` x `n` internal tiles of texture, the first at `at` (row, column); `missing` is (h, w) bool over the texture"
    c = Cell.parse(cell)
    path = Path(ard)/(zone_dir or f'{c.zone:02d}')/c.quadkey/(day or '')/f'{catalog_id}-visual.tif'
    path.parent.mkdir(parents=True, exist_ok=True)
    apron = (size-16384)/2*gsd
    options = dict(photometric='ycbcr') if compress=='jpeg' and bands==3 else {}
    side = min(512*n, size)
    pixels, w = texture(side, bands, seed).astype(dtype), Window(512*at[1], 512*at[0], side, side)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, 'w', driver='GTiff', width=size, height=size, count=bands, dtype=dtype, crs=f'EPSG:{epsg or c.epsg}',
            transform=from_origin(c.bounds.left-apron+east*gsd, c.bounds.top+apron-south*gsd, gsd, gsd), tiled=True, blockxsize=512, blockysize=512, compress=compress, **{'SPARSE_OK':True, **options, **extra}) as d:
        if missing is not None: pixels = pixels*~missing
        d.write(pixels, window=w)
        if mask: d.write_mask(np.full((side,side),True) if missing is None else ~missing, window=w)
    return path

def cut(n=1536):
    "A slanted edge of a scene, as (n, n) bool: True where nothing was seen"
    y,x = np.mgrid[:n,:n]
    return x+y/3>900

def by_gdal(data):
    with MemoryFile(data) as m, m.open() as d: return d.read()

def in_tile(path, name, px=512):
    "What rasterio reads of a chip's square: (bands, px, px) and the mask"
    with rasterio.open(path) as d:
        b = chip_bounds(name)
        col, row = (round(v) for v in ~d.transform*(b.left, b.top))
        w = Window(col, row, px, px)
        return d.read(window=w, boundless=True, fill_value=0), d.read_masks(1, window=w, boundless=True)>0

def snapshot(folder): return {str(p.relative_to(folder)):p.read_bytes() for p in sorted(Path(folder).rglob('*')) if p.is_file()}

def worker(code, *args):
    "Run Python code in a process of its own"
    return subprocess.Popen([sys.executable, '-c', code, *map(str,args)], env={**os.environ, 'PYTHONPATH':str(ROOT)})

RUN = 'import sys; from imagesim.chip import chip_ard; sys.exit(chip_ard(sys.argv[1], sys.argv[2], proc=1).exit_code)'

# --- the splice ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "A delivery of one tile, chipped"
    root = tmp_path_factory.mktemp('small')
    path = make_tile(root/'ard', missing=cut())
    return root, path, chip_ard(root/'ard', root/'chips/33', proc=1, nodata_index=root/'nodata-index.json')

def test_chips_are_the_tiles_own_pixels(small):
    root, path, s = small
    names = find_chips(root/'chips/33')
    assert (s.done, s.exit_code, s.extra['chips']) == (1, 0, len(names)) and 0<len(names)<=9
    for n in names:
        jpg = (root/'chips/33'/n).read_bytes()
        assert np.array_equal(by_gdal(jpg), in_tile(path, n)[0]), n

def test_chips_are_the_tiles_own_streams(small):
    "Everything but the segments put in front is, byte for byte, in the COG"
    root, path, _ = small
    cog = path.read_bytes()
    for n in find_chips(root/'chips/33'):
        jpg = (root/'chips/33'/n).read_bytes()
        assert jpg[:4]==b'\xff\xd8\xff\xe0' and jpg[6:11]==b'JFIF\0' and jpg[-2:]==b'\xff\xd9'
        assert jpg[jpg.index(b'\xff\xc0'):] in cog

def test_index_tells_the_truth(small):
    root, path, s = small
    ix = read_chip_index(root/f'chips/index/z17/zone=33/{CELL[4:]}_{CAT}.parquet')
    assert len(ix)==1024 and ix['chip'].tolist()==sorted(ix['chip'])
    written = set(find_chips(root/'chips/33'))
    raw = path.read_bytes()
    for row in ix.table.to_pylist():
        if row['offset'] is not None:
            assert splice_jpeg(ix.tables, raw[row['offset']:][:row['length']])==(root/'chips/33'/row['chip']).read_bytes() if row['chip'] in written else row['valid']==0
        assert (row['chip'] in written)==(row['valid']>0)
        if row['offset'] is not None: assert row['valid']==in_tile(path, row['chip'])[1].mean()
        else: assert row['valid']==0
    assert str(ix['date'][0])==DAY and ix.meta['valid_from']=='mask' and not (set(ix['clear']) - {None}) or np.isnan(ix['clear'].astype(float)).all()
    classes = json.loads((root/'nodata-index.json').read_text())
    assert classes=={r['chip']: 'all data' if r['valid']==1 else 'no data' if r['valid']==0 else 'partial data' for r in ix.table.to_pylist()}
    assert set(classes.values())=={'all data','partial data','no data'}

def test_round_trip_to_the_cog(small):
    root, path, _ = small
    for n in find_chips(root/'chips/33')[:2]: assert get_cog_path_from_chip(n, root/'ard')==str(path)

def test_other_decoders(small):
    "Pillow and torchvision decode a chip as they decode the stream they get from libtiff"
    root, path, _ = small
    names = find_chips(root/'chips/33')
    for n in names:
        a, want = np.asarray(Image.open(root/'chips/33'/n)).astype(int), np.moveaxis(in_tile(path, n)[0],0,-1)
        assert a.shape==(512,512,3) and np.abs(a-want).mean()<1
    tv = pytest.importorskip('torchvision.io')
    a = tv.decode_jpeg(tv.read_file(str(root/'chips/33'/names[0]))).numpy()
    assert np.abs(a.astype(int)-in_tile(path, names[0])[0]).mean()<1

@pytest.mark.skipif(not shutil.which('chromium'), reason='no browser here')
def test_chromium_shows_it_in_the_right_colours(small, tmp_path):
    from base64 import b64encode
    root, path, _ = small
    n = find_chips(root/'chips/33')[0]
    src = 'data:image/jpeg;base64,'+b64encode((root/'chips/33'/n).read_bytes()).decode()
    (tmp_path/'p.html').write_text(f'''<body>wait<script>const i=new Image();i.onload=()=>{{const c=document.createElement('canvas');c.width=i.width;c.height=i.height;
      const x=c.getContext('2d');x.drawImage(i,0,0);const d=x.getImageData(0,0,i.width,i.height).data;let s=[0,0,0];for(let k=0;k<d.length;k+=4)for(let j=0;j<3;j++)s[j]+=d[k+j];
      document.body.textContent='mean '+s.map(v=>(v/i.width/i.height).toFixed(2)).join(' ')}};i.onerror=()=>document.body.textContent='broken';i.src='{src}'</script>''')
    out = subprocess.run(['chromium', '--headless', '--no-sandbox', '--disable-gpu', '--virtual-time-budget=5000', '--dump-dom', f'file://{tmp_path}/p.html'],
                         capture_output=True, text=True, timeout=60, env={**os.environ, 'HOME':str(tmp_path)}).stdout
    got = [float(v) for v in out.split('mean ')[1].split('<')[0].split()]
    assert np.allclose(got, in_tile(path, n)[0].mean(axis=(1,2)), atol=1)

def test_real_tile(shared, tmp_path):
    "Banepa: every chip, its pixels and its valid share"
    ard = shared/'banepa/ard'
    s = chip_ard(ard, tmp_path/'chips/45', proc=1)
    path = next(ard.rglob('*-visual.tif'))
    names = find_chips(tmp_path/'chips/45')
    assert s.extra['chips']==len(names)==26 and s.extra['empty']==998
    store = ChipStore(tmp_path/'chips/45')
    ix = read_chip_index(store.indexes()[0])
    valid = dict(zip(ix['chip'], ix['valid']))
    for n in names:
        pixels, seen = in_tile(path, n)
        assert np.array_equal(by_gdal((tmp_path/'chips/45'/n).read_bytes()), pixels)
        assert valid[n]==np.float32(seen.mean())
    with rasterio.open(path) as d: seen = d.dataset_mask(window=Window(512,512,16384,16384))>0
    assert np.array_equal(chip_names(Cell.parse('Z45-031331122210'), 'A0A0000000000001')[seen.reshape(32,512,32,512).any(axis=(1,3))], np.array(sorted(names), dtype=object)) or \
        set(names)==set(chip_names(Cell.parse('Z45-031331122210'), 'A0A0000000000001')[seen.reshape(32,512,32,512).any(axis=(1,3))])

# --- everything that can not be spliced ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('zoom,px', [(15,2048), (16,1024), (18,256), (19,128)])
def test_other_levels(tmp_path, zoom, px):
    path = make_tile(tmp_path/'ard', missing=cut())
    s = chip_ard(tmp_path/'ard', tmp_path/'c', zoom=zoom, proc=1)
    names = find_chips(tmp_path/'c')
    assert s.extra['chips']==len(names)>0 and {parse_chip(n).level for n in names}=={zoom}
    ix = read_chip_index(tmp_path/f'c/index/z{zoom}/zone=33/{CELL[4:]}_{CAT}.parquet')
    assert len(ix)==4**(zoom-12) and ix['offset'].tolist().count(None)+np.isnan(ix['offset'].astype(float)).sum()>=len(ix)
    valid = dict(zip(ix['chip'], ix['valid']))
    for n in names:
        pixels, seen = in_tile(path, n, px)
        got = np.asarray(open_chip(n, tmp_path/'c'))
        assert got.shape==(px,px,3) and valid[n]==np.float32(seen.mean())
        inside = seen & ~near_edge(seen)
        if inside.any(): assert np.abs(got.astype(int)-np.moveaxis(pixels,0,-1))[inside].mean()<3
        outside = ~seen & ~near_edge(seen)
        if outside.any(): assert (got[outside]>6).mean()<0.01, 'masked pixels are black, but for colour that bleeds over the edge of a JPEG block'

def near_edge(seen, d=16):
    "Pixels within an MCU of the border between seen and missing"
    h,w = (o//d for o in seen.shape)
    b = seen[:h*d,:w*d].reshape(h,d,w,d)
    return np.kron(b.any(axis=(1,3)) & ~b.all(axis=(1,3)), np.ones((d,d),bool))

@pytest.mark.parametrize('kw,mode', [(dict(compress='deflate'),'RGB'), (dict(compress='deflate',bands=1),'L'), (dict(compress='jpeg',bands=1),'L'), (dict(photometric='rgb'),'RGB'),
                                     (dict(compress='deflate',bands=4),'RGB'), (dict(interleave='band',photometric='rgb'),'RGB'), (dict(BIGTIFF='YES'),'RGB'), (dict(ENDIANNESS='BIG'),'RGB')])
def test_other_tiles(tmp_path, kw, mode):
    path = make_tile(tmp_path/'ard', missing=cut(), **kw)
    s = chip_ard(tmp_path/'ard', tmp_path/'c', proc=1)
    names = find_chips(tmp_path/'c')
    assert s.exit_code==0 and len(names)>=6, s
    for n in names:
        pixels, seen = in_tile(path, n)
        im = Image.open(tmp_path/'c'/n)
        assert im.mode==mode
        got, want = np.asarray(im.convert('RGB')).astype(int), np.moveaxis(np.broadcast_to(pixels[:3] if len(pixels)>1 else pixels, (3,512,512)),0,-1)
        inside = seen & ~near_edge(seen)
        assert np.abs(got-want)[inside].mean()<4, kw # noise of 8 grey levels, quality 90

def test_tile_without_mask_counts_as_seen(tmp_path):
    make_tile(tmp_path/'ard', mask=False)
    s = chip_ard(tmp_path/'ard', tmp_path/'c', proc=1)
    ix = read_chip_index(next((tmp_path/'c/index').rglob('*.parquet')))
    assert s.extra['chips']==9 and ix.meta['valid_from']=='nothing marked' and sorted(set(ix['valid']))==[0,1] # blocks left out of the file were not seen

def test_nodata_value_and_alpha(tmp_path, shared):
    make_tile(tmp_path/'ard', mask=False, nodata=0, missing=cut(), compress='deflate')
    chip_ard(tmp_path/'ard', tmp_path/'c', proc=1)
    ix = read_chip_index(next((tmp_path/'c/index').rglob('*.parquet')))
    assert ix.meta['valid_from']=='nodata value' and np.isclose(ix['valid'].sum()*512**2, (~cut()).sum())

@pytest.mark.parametrize('east,south', [(0.4,-0.3), (0.99,0.99)])
def test_less_than_a_pixel_off_is_snapped(tmp_path, east, south):
    path = make_tile(tmp_path/'ard', east=east, south=south)
    s = chip_ard(tmp_path/'ard', tmp_path/'c', proc=1)
    assert s.extra['chips']==9
    raw = path.read_bytes()
    for n in find_chips(tmp_path/'c'):
        jpg = (tmp_path/'c'/n).read_bytes()
        assert jpg[jpg.index(b'\xff\xc0'):] in raw
    shift = read_chip_index(next((tmp_path/'c/index').rglob('*.parquet'))).meta['shift_px']
    assert np.allclose(shift, (-east,-south), atol=1e-3)

def test_whole_pixels_off_is_decoded_exactly(tmp_path):
    path = make_tile(tmp_path/'ard', east=100, south=-37)
    assert chip_ard(tmp_path/'ard', tmp_path/'c', proc=1).extra['chips']==12 # 3 x 3 chips' worth of texture, moved east and, out of the cell, north
    for n in find_chips(tmp_path/'c'):
        pixels, seen = in_tile(path, n)
        got, inside = np.asarray(Image.open(tmp_path/'c'/n)).astype(int), seen & ~near_edge(seen)
        if inside.any(): assert np.abs(got-np.moveaxis(pixels,0,-1))[inside].mean()<3

@pytest.mark.parametrize('kw,word', [(dict(east=3.4), 'column 508.60'), (dict(gsd=0.3), 'pixels of 0.3 m'), (dict(epsg=32634), 'EPSG:32634'), (dict(dtype='uint16',compress='deflate'), 'samples are uint16')])
def test_refused_with_the_numbers(tmp_path, kw, word):
    make_tile(tmp_path/'ard', **kw)
    make_tile(tmp_path/'ard', catalog_id='GOOD')
    s = chip_ard(tmp_path/'ard', tmp_path/'c', proc=1)
    assert (s.done, s.failed, s.exit_code)==(1,1,1) and word in s.failures[0][1] and len(find_chips(tmp_path/'c'))==9

def test_tile_without_apron(tmp_path):
    make_tile(tmp_path/'ard', size=16384, at=(0,0))
    s = chip_ard(tmp_path/'ard', tmp_path/'c', proc=1)
    assert s.extra['chips']==9 and find_chips(tmp_path/'c')[0].startswith(CELL+'00000')

# --- names, places, dates ----------------------------------------------------------------------------------------------------------------

def test_zones_hemispheres_and_dates(tmp_path):
    for cell,cat in ((CELL,'A1'), ('Z60-213111101230','B2'), ('Z01-031333333333','0c9d1ef2-5b3a-4a8e-9d8d-2b0a5a0f1e11-inv')):
        for day in ('2020-01-01','2021-01-01'): make_tile(tmp_path/'ard', cell=cell, day=day, catalog_id=f'{cat}.{day[:4]}', n=2)
    make_tile(tmp_path/'ard', day=None, catalog_id='undated', n=1)
    s = chip_ard(tmp_path/'ard', tmp_path/'chips', proc=2)
    names = find_chips(tmp_path/'chips')
    assert s.done==7 and s.exit_code==0 and len(names)==6*4+1
    for n in names: assert chip_bounds(n)==parse_chip(n).cell.bounds
    store = ChipStore(tmp_path/'chips', ard=tmp_path/'ard')
    assert [len(o) for o in store.read(names)]==[(tmp_path/'chips'/n).stat().st_size for n in names]
    assert store.names()==names and store.names(zone=60)==[n for n in names if n.startswith('Z60')]

def test_odd_catalog_ids_never_leave_the_folder(tmp_path):
    good = make_tile(tmp_path/'ard', n=1)
    for odd in ('..', 'a b', 'ä', "x'; rm -rf", 'a%2f..%2fb', '...', '-', 'A..B', 'con\nrol', 'x'*200, '$(id)'):
        try: shutil.copy(good, good.with_name(f'{odd}-visual.tif'))
        except OSError: pass
    s = chip_ard(tmp_path/'ard', tmp_path/'out/chips/33', proc=1)
    assert s.exit_code==1 and s.failed>=8
    made = {p.relative_to(tmp_path) for p in tmp_path.rglob('*') if p.is_file() and 'ard' not in p.parts}
    assert all(p.parts[:2]==('out','chips') for p in made) and len(find_chips(tmp_path/'out/chips/33'))==s.done

@pytest.mark.parametrize('name', ['Z33-0313110231200/../../x_A.jpg', 'Z33-03131102312000000_../../etc/passwd', '../Z33-03131102312000000_A.jpg\0', 'Z33-03131102312000000_a/b.jpg'])
def test_names_never_become_other_paths(tmp_path, name):
    (tmp_path/'passwd').write_text('secret')
    store = ChipStore(tmp_path/'chips/33')
    with pytest.raises((InputError, MissingError)): store.read([name])

# --- bad input ------------------------------------------------------------------------------------------------------------------------------

def test_bad_tiles_are_a_line_each(tmp_path, shared):
    good = make_tile(tmp_path/'ard', catalog_id='GOOD')
    there = good.parent
    shutil.copy(shared/'cog/corrupt.tif', there/'CORRUPT-visual.tif')
    (there/'CUT-visual.tif').write_bytes(good.read_bytes()[:-5000])
    (there/'TEXT-visual.tif').write_text('I am no picture')
    (there/'EMPTY-visual.tif').write_bytes(b'')
    bad = bytearray(good.read_bytes())
    im = read_tiff(good)[0]
    o = int(im.offsets[2,2])
    bad[o:o+400] = bytes(400)
    (there/'HOLE-visual.tif').write_bytes(bad)
    s = chip_ard(tmp_path/'ard', tmp_path/'c', proc=1)
    why = {Path(k).name:v for k,v in s.failures}
    assert (s.done, s.failed, s.exit_code)==(1,5,1) and len(find_chips(tmp_path/'c'))==9
    assert 'reach to byte 307,086, but it ends at 298,232' in why['CORRUPT-visual.tif'] and 'cut off or damaged' in why['CUT-visual.tif'] and 'not a TIFF' in why['TEXT-visual.tif'] and 'not a TIFF' in why['EMPTY-visual.tif']
    assert 'row 2, column 2' in why['HOLE-visual.tif'] and all('\n' not in v for v in why.values())

def test_broken_item_is_named_and_the_chips_are_made(tmp_path):
    path = make_tile(tmp_path/'ard')
    path.with_name(f'{CAT}.json').write_text('{"type": "Feat')
    s = chip_ard(tmp_path/'ard', tmp_path/'c', proc=1)
    assert s.done==1 and s.exit_code==1 and f'{CAT}.json' in s.failures[0][0] and len(find_chips(tmp_path/'c'))==9

def test_full_disk(tmp_path, monkeypatch):
    make_tile(tmp_path/'ard')
    real, n = os.writev, [0]
    def full(fd, parts):
        n[0] += 1
        if n[0]>3: raise OSError(28, 'No space left on device')
        return real(fd, parts)
    monkeypatch.setattr(os, 'writev', full)
    s = chip_ard(tmp_path/'ard', tmp_path/'c', proc=1)
    assert s.exit_code==1 and 'No space left on device' in s.failures[0][1]
    assert len(find_chips(tmp_path/'c'))==3 and not [p for p in (tmp_path/'c').rglob('*') if p.name.startswith('.')]
    monkeypatch.setattr(os, 'writev', real)
    assert chip_ard(tmp_path/'ard', tmp_path/'c', proc=1).exit_code==0 and len(find_chips(tmp_path/'c'))==9

def test_settings_that_can_not_work_stop_before_work(tmp_path):
    make_tile(tmp_path/'ard')
    (tmp_path/'file').write_text('')
    for kw,word in ((dict(zoom=12),'15'), (dict(quality=0),'1 to 95'), (dict(subsampling='4:1:1'),'4:4:4'), (dict(dest=tmp_path/'file'),'is a file'), (dict(dest=tmp_path/'ard/33'),'never modified'),
                    (dict(zone=34),'zone 34')):
        with pytest.raises(InputError, match=word): chip_ard(tmp_path/'ard', **{'dest':tmp_path/'c', 'proc':1, **kw})
    with pytest.raises((InputError,MissingError)): chip_ard(tmp_path/'nowhere', tmp_path/'c')

@pytest.mark.skipif(os.geteuid()==0, reason='root may write anywhere')
def test_read_only_destination(tmp_path):
    make_tile(tmp_path/'ard')
    (tmp_path/'c').mkdir(mode=0o555)
    with pytest.raises(StorageError, match='may write to|not writable'): chip_ard(tmp_path/'ard', tmp_path/'c', proc=1)

# --- again, killed, at once --------------------------------------------------------------------------------------------------------------

def test_run_again(tmp_path):
    path, c = make_tile(tmp_path/'ard', missing=cut()), tmp_path/'chips/33'
    go = lambda **kw: chip_ard(tmp_path/'ard', c, proc=1, **kw)
    assert go().done==1
    first = snapshot(tmp_path/'chips')
    assert (go().skipped, go(virtual=True).skipped)==(1,1) and snapshot(tmp_path/'chips')==first
    one = c/find_chips(c)[0]
    one.unlink()
    assert go().done==1 and snapshot(tmp_path/'chips')==first # what is missing is made again
    one.write_bytes(b'spoilt')
    assert go(overwrite=True).done==1 and snapshot(tmp_path/'chips')==first
    os.utime(path, (1,1))
    assert go().done==1 and go().skipped==1
    assert go(keep_empty=True).extra['chips']==1024 and len(find_chips(c))==1024

def test_a_tile_ordered_again(tmp_path):
    "Other pixels under the same path: the chips follow, and those that have no pixel any more go"
    c = tmp_path/'chips/33'
    make_tile(tmp_path/'ard', n=3)
    chip_ard(tmp_path/'ard', c, proc=1)
    before = snapshot(c)
    make_tile(tmp_path/'ard', n=2, seed=7)
    assert chip_ard(tmp_path/'ard', c, proc=1).done==1
    after = snapshot(c)
    assert len(before)==9 and len(after)==4 and not set(before.values()) & set(after.values())

def test_virtual_then_real(tmp_path):
    make_tile(tmp_path/'ard', missing=cut())
    c = tmp_path/'chips/33'
    s = chip_ard(tmp_path/'ard', c, proc=1, virtual=True)
    assert find_chips(c)==[] and s.extra['chips indexed']>0
    store = ChipStore(c)
    names = store.names()
    virtual = store.read(names)
    assert chip_ard(tmp_path/'ard', c, proc=1).done==1 and find_chips(c)==names
    assert [(c/n).read_bytes() for n in names]==virtual==ChipStore(c).read(names)

WATCH = '''
import os, sys, time
folder, seen, bad = sys.argv[1], 0, 0
while not os.path.exists(sys.argv[2]) and os.getppid()>1:
    time.sleep(.01) # leave the core to those it watches
    try: names = os.listdir(folder)
    except FileNotFoundError: continue
    for n in names:
        if not n.endswith('.jpg'): continue
        with open(os.path.join(folder, n), 'rb') as f: d = f.read()
        seen += 1
        if not (d[:2]==b'\\xff\\xd8' and d[-2:]==b'\\xff\\xd9'): print('half written', n, len(d)); bad += 1
print(seen, 'looks')
sys.exit(bad>0 or not seen)
'''

@pytest.fixture(scope='module')
def many(tmp_path_factory):
    "Twelve tiles of 64 chips, and what an undisturbed run makes of them"
    root = tmp_path_factory.mktemp('many')
    first = make_tile(root/'ard', catalog_id='CAT00', n=8)
    for i in range(1, 12): shutil.copy(first, first.with_name(first.name.replace('CAT00', f'CAT{i:02}')))
    chip_ard(root/'ard', root/'want/33', proc=1)
    want = snapshot(root/'want')
    assert len(want)==12*65
    return root, want

@pytest.mark.parametrize('unnamed', [True, False])
def test_kill_in_the_middle(many, tmp_path, unnamed):
    root, want = many
    dest, stop = root/f'killed{unnamed}/33', tmp_path/'stop'
    slow = f'''
import os, sys, time
from imagesim import chip
if not {unnamed}: del os.O_TMPFILE
real = os.writev
def writev(fd, parts):
    time.sleep(0.0005)
    n = os.write(fd, bytes(parts[0])) # in two goes, so that there is a half-written file to be seen
    time.sleep(0.0005)
    return n+sum(os.write(fd, bytes(p)) for p in parts[1:])
os.writev = writev
chip.chip_ard(sys.argv[1], sys.argv[2], proc=1)
'''
    watcher = worker(WATCH, dest, stop)
    for limit in (70, 300):
        p = worker(slow, root/'ard', dest)
        while p.poll() is None and len(find_chips(dest) if dest.is_dir() else ())<limit: time.sleep(0.005)
        p.send_signal(signal.SIGKILL); p.wait()
    assert 300<=len(find_chips(dest))<12*64
    p = worker(RUN, root/'ard', dest)
    assert p.wait()==0
    stop.touch()
    assert watcher.wait()==0, 'a reader saw half a chip'
    assert snapshot(dest.parent)==want # the same files, nothing else, not even hidden

def test_two_runs_at_once(many, tmp_path):
    root, want = many
    dest, stop = root/'twice/33', tmp_path/'stop'
    watcher = worker(WATCH, dest, stop)
    runs = [worker(RUN, root/'ard', dest) for _ in range(2)]
    assert [p.wait() for p in runs]==[0,0]
    stop.touch()
    assert watcher.wait()==0 and snapshot(dest.parent)==want

def test_processes_make_the_same(many):
    root, want = many
    s = chip_ard(root/'ard', root/'two/33', proc=2)
    assert s.done==12 and snapshot(root/'two')==want

# --- clouds ------------------------------------------------------------------------------------------------------------------------------------

def write_clouds(path, geoms, epsg):
    import geopandas as gpd
    gpd.GeoDataFrame(geometry=list(geoms), crs=epsg).to_file(path, driver='GPKG', engine='pyogrio')

def test_clear_shares(tmp_path):
    from shapely import Point, box
    cell = Cell.parse(CELL)
    l,b,r,t = cell.bounds
    path = make_tile(tmp_path/'ard')
    gpkg = path.with_name(f'{CAT}-cloud-mask.gpkg')
    write_clouds(gpkg, [box(l, t-156.25/2, l+156.25, t), box(l, t-156.25/4, l+100, t), Point(l+1000, t-1000).buffer(300)], cell.epsg) # the first two overlap
    clear = clear_shares(gpkg, cell)
    assert np.isclose(clear[0,0], 0.5) and clear[20,20]==1
    assert np.isclose((1-clear).sum()*156.25**2, 156.25**2/2+Point(0,0).buffer(300).area, rtol=1e-4)
    chip_ard(tmp_path/'ard', tmp_path/'c', proc=1)
    ix = read_chip_index(next((tmp_path/'c/index').rglob('*.parquet')))
    assert dict(zip(ix['chip'], ix['clear']))[f'{CELL}00000_{CAT}.jpg']==0.5
    write_clouds(gpkg, [Point(*cell.lonlat).buffer(0.005)], 4326) # degrees are understood too
    assert chip_ard(tmp_path/'ard', tmp_path/'c', proc=1).done==1 and 0.5<clear_shares(gpkg, cell).mean()<0.99
    gpkg.write_text('no database')
    s = chip_ard(tmp_path/'ard', tmp_path/'c', proc=1)
    assert s.exit_code==1 and 'not a readable GeoPackage' in s.failures[0][1]

def test_no_clouds_is_all_clear(tmp_path):
    gpkg = tmp_path/'A-cloud-mask.gpkg'
    write_clouds(gpkg, [], 32633)
    assert (clear_shares(gpkg, Cell.parse(CELL))==1).all()

# --- buckets -----------------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def few(tmp_path_factory):
    "Two tiles of 9 chips"
    root = tmp_path_factory.mktemp('few')
    for i in range(2): make_tile(root/'ard', catalog_id=f'CAT{i}', seed=i)
    chip_ard(root/'ard', root/'want/33', proc=1)
    return root, {p.name:p.read_bytes() for p in (root/'want/33').iterdir()}

def test_bucket_on_both_sides(few, bucket):
    root, want = few
    sync(root/'ard/33', f'{bucket}/ard/33')
    go = lambda: chip_ard(f'{bucket}/ard/33', f'{bucket}/chips/33', proc=1, nodata_index=f'{bucket}/nodata-index.json')
    assert (go().done, go().skipped)==(2,2)
    assert {Path(f.path).name:f.size for f in list_files(f'{bucket}/chips', '.jpg')}=={k:len(v) for k,v in want.items()}
    store, names = ChipStore(f'{bucket}/chips/33'), sorted(want)
    assert store.names()==names and store.read(names)==[want[n] for n in names]

def test_virtual_from_a_bucket(few, bucket, tmp_path):
    root, want = few
    sync(root/'ard/33', f'{bucket}/ard/33')
    assert chip_ard(f'{bucket}/ard/33', tmp_path/'chips/33', proc=1, virtual=True).done==2
    names = sorted(want)
    assert read_chips(names, tmp_path/'chips/33')==[want[n] for n in names] and not list((tmp_path/'chips').rglob('*.jpg'))
    make_tile(tmp_path/'other', catalog_id='CAT0', n=4)
    sync(tmp_path/'other/33', f'{bucket}/ard/33')
    with pytest.raises(CorruptError, match='changed since its chips were indexed'): ChipStore(tmp_path/'chips/33').read(names[:1])

def test_a_tile_in_a_bucket_takes_few_requests(few, bucket, tmp_path, monkeypatch):
    "The header once, then the blocks that are needed, merged"
    from imagesim import infra
    root, _ = few
    sync(root/'ard/33', f'{bucket}/ard/33')
    spans, real = [], infra._read_spans
    monkeypatch.setattr(infra, '_read_spans', lambda path, s: (spans.extend(s), real(path, s))[1])
    chip_ard(f'{bucket}/ard/33', tmp_path/'c/33', proc=1)
    size = sum(f.size for f in list_files(f'{bucket}/ard', '.tif'))
    assert len(spans)<=2*8 and sum(e-s for s,e in spans)<1.3*size, spans

def test_other_levels_from_a_bucket(small, bucket, tmp_path):
    root, _, _ = small
    sync(root/'ard/33', f'{bucket}/ard/33')
    for kw in (dict(zoom=18), dict(zoom=16)):
        a, b = chip_ard(root/'ard', tmp_path/f'a{kw["zoom"]}', proc=1, **kw), chip_ard(f'{bucket}/ard/33', tmp_path/f'b{kw["zoom"]}', proc=1, **kw)
        jpgs = [{p.name:p.read_bytes() for p in tmp_path.glob(f'{x}{kw["zoom"]}/*.jpg')} for x in 'ab']
        assert a.exit_code==b.exit_code==0 and jpgs[0]==jpgs[1] and jpgs[0]

def test_gdal_reads_the_bucket_too(bucket, tmp_path):
    "A tile that only GDAL can decode"
    make_tile(tmp_path/'ard', compress='deflate')
    sync(tmp_path/'ard/33', f'{bucket}/ard/33')
    p = worker(RUN, f'{bucket}/ard/33', tmp_path/'c') # not here: rasterio keeps the GIL while it asks a server that lives in this very process
    assert p.wait(60)==0 and len(find_chips(tmp_path/'c'))==9

# --- the command, in its older spelling ------------------------------------------------------------------------------------------------------------

def module(*args):
    return subprocess.run([sys.executable, '-m', 'imagesim.chip', *map(str,args)], env={**os.environ, 'PYTHONPATH':str(ROOT)}, capture_output=True, text=True, timeout=120)

def test_python_m_imagesim_chip(tmp_path):
    good = make_tile(tmp_path/'ard', missing=cut())
    p = module('--ard-path', tmp_path/'ard/33', '--zoom', 17, '--proc', 4, '--dest', tmp_path/'chips/33')
    assert p.returncode==0 and '1 tile done' in p.stdout and find_chips(tmp_path/'chips/33'), p.stderr
    p = module('--filename', tmp_path/'nodata-index.json', '--chip-dir', tmp_path/'chips/33')
    assert p.returncode==0 and set(json.loads((tmp_path/'nodata-index.json').read_text()))==set(find_chips(tmp_path/'chips/33')), p.stderr
    good.with_name('TEXT-visual.tif').write_text('no picture')
    p = module('--ard-path', tmp_path/'ard/33', '--dest', tmp_path/'chips/33')
    assert p.returncode==1 and 'not a TIFF' in p.stdout and 'Traceback' not in p.stderr+p.stdout
    p = module('--ard-path', tmp_path/'nowhere', '--dest', tmp_path/'chips/33')
    assert p.returncode==2 and 'nowhere' in p.stderr and 'Traceback' not in p.stderr

# --- small things --------------------------------------------------------------------------------------------------------------------------------

def test_fit_grid_of_real_tiles():
    "The provider's own example: origin 289843.75, 5930156.25 in EPSG:32760"
    cell = Cell.at(*Transformer.from_crs(32760, 4326, always_xy=True).transform(292500, 5927500))
    fit = fit_grid(cell, GeoRef(289843.75, 5930156.25, GSD, 32760))
    assert (fit.px, fit.n, fit.col, fit.row, fit.shift)==(512, 32, 512, 512, (0,0))

def test_chip_names_lie_where_their_bounds_are():
    cell = Cell.parse(CELL)
    names = chip_names(cell, 'A', 17)
    l,_,_,t = cell.bounds
    for r,c in ((0,0), (0,31), (31,0), (17,5)):
        b = chip_bounds(names[r,c])
        assert (b.left, b.top)==(l+156.25*c, t-156.25*r)
    assert len(set(names.ravel()))==1024

def test_cover_shares_adds_up():
    from shapely import box
    cell = Cell.parse(CELL)
    l,b,r,t = cell.bounds
    assert (cover_shares(box(l-10,b-10,r+10,t+10), cell)==1).all() and (cover_shares(box(r+1,b,r+9,t), cell)==0).all()
    assert np.isclose(cover_shares(box(l+33,b+77,l+1033,b+1077), cell).sum()*156.25**2, 1e6)

def test_writer_replaces_and_leaves_nothing(tmp_path):
    for unnamed in (True, False):
        with ChipWriter(str(tmp_path)) as w:
            w.unnamed = w.unnamed and unnamed
            for text in (b'one', b'two'): w.write('a.jpg', text, b'!')
        assert snapshot(tmp_path)=={'a.jpg':b'two!'}
    (tmp_path/'.parts').mkdir()
    (tmp_path/'.parts'/f'{socket.gethostname()}.999999999.aa').write_text('left by a killed run')
    with ChipWriter(str(tmp_path)): pass
    assert not (tmp_path/'.parts').exists()

BARE = '''
import sys
class No:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('rasterio','geopandas','shapely','pyproj','maxar_ard_grid','pyogrio','fiona','torch'): raise ImportError(f'{name} is not on this machine')
sys.meta_path.insert(0, No())
from imagesim.read import ChipStore, open_chip
store = ChipStore(sys.argv[1])
names = store.names()
assert names and all(len(d)>1000 for d in store.read(names)) and open_chip(names[0], sys.argv[1]).size==(512,512)
'''

def test_reading_needs_no_raster_library(tmp_path):
    "Floor 1: a bare GPU machine reads virtual chips"
    make_tile(tmp_path/'ard', missing=cut())
    chip_ard(tmp_path/'ard', tmp_path/'chips/33', proc=1, virtual=True)
    assert worker(BARE, tmp_path/'chips/33').wait(60)==0
