"""Encoding: the files, resuming after kill -9, damage, buckets, and geometry against pyproj"""
import io, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest, torch
from hypothesis import given, settings, strategies as st

from conftest import ROOT
from imagesim.ard import Cell
from imagesim.bundle import load_encoder, make_bundle, register_encoder
from imagesim.chip import chip_ard
from imagesim.compress import fit_pca
from imagesim.encode import (as_array, compare_encoders, embedding_facts, embedding_path, embedding_schema, encode, encode_pictures, make_table, open_vectors, place_corners, read_embeddings,
    table_bytes, utm_to_lonlat, wkb_squares)
from imagesim.infra import CorruptError, InputError, MissingError, list_files
from imagesim.read import ChipStore, read_chip_index
from imagesim.synth import make_delivery

SPEC = dict(backbone='squeezenet1_0', weights='random', size=64)
CPU = dict(device='cpu', workers=0)

@pytest.fixture(scope='module')
def town(tmp_path_factory):
    "A delivery of two dates and two cells, virtual chips, and an encoder; read only"
    root = tmp_path_factory.mktemp('town')
    make_delivery(root, size=4, dates=2, seed=2)
    chip_ard(root/'ard', root/'chips/33', proc=1, virtual=True)
    make_bundle(SPEC, root/'encoder', credits='weights by nobody')
    return root

@pytest.fixture(scope='module')
def done(town):
    s = encode(town/'encoder', town/'chips', town/'embeddings', **CPU, credits='imagery by somebody')
    assert s.exit_code==0 and s.done==2 and s.extra['seconds to load the encoder']>=0
    return town/'embeddings'

def hashes(folder): return {f.path[len(str(folder)):]:(f.size, Path(f.path).read_bytes()) for f in list_files(folder)}

# ---- geometry

@pytest.mark.parametrize('zone', [1, 17, 31, 33, 45, 60])
@pytest.mark.parametrize('south', [False, True])
def test_inverse_utm_equals_pyproj(zone, south):
    from pyproj import Transformer
    rng = np.random.default_rng(zone)
    edge = rng.choice([100_000., 166_021.44, 500_000., 833_978.56, 900_000.], 500)+rng.uniform(-50, 50, 500)
    east, north = np.concatenate([rng.uniform(100_000, 900_000, 2000), edge]), rng.uniform(1_100_000 if south else 0, 10_000_000 if south else 9_300_000, 2500)
    lon, lat = Transformer.from_crs((32700 if south else 32600)+zone, 4326, always_xy=True).transform(east, north)
    x, y = utm_to_lonlat(east, north, zone, south)
    assert np.abs((x-lon+180)%360-180).max()<1e-9 and np.abs(y-lat).max()<1e-9

@given(st.integers(1, 60), st.text('0123', min_size=16, max_size=16), st.sampled_from('0123'))
@settings(max_examples=80, deadline=None)
def test_places_lie_where_the_grid_says(zone, rest, first):
    c = Cell(zone, first+rest)
    try: want = c.lonlat
    except Exception: return
    l,b,r,t = c.bounds
    if not (100_000<l<900_000 and np.isfinite(want).all() and abs(want[1])<84): return # the grid goes on where UTM has ended
    corners, lon, lat = place_corners([c.id])
    assert abs((lon[0]-want[0]+180)%360-180)<1e-9 and abs(lat[0]-want[1])<1e-9

@given(st.floats(-185, 185), st.floats(-80, 80), st.floats(1e-4, .01))
@settings(max_examples=80, deadline=None)
def test_squares_are_valid_and_keep_their_area(lon, lat, s):
    from shapely import from_wkb
    g = from_wkb(wkb_squares(np.array([[[lon,lat],[lon+s,lat],[lon+s,lat+s],[lon,lat+s]]])))[0]
    assert g.is_valid and abs(g.area-s*s)<1e-9+1e-6*s*s and -180<=g.bounds[0]<=g.bounds[2]<=180
    assert (g.bounds[2]-g.bounds[0]<.02) == (g.geom_type=='Polygon') or g.area<1e-9

# ---- files

def invented(n=20, d=8, classes=None, seed=0):
    rng = np.random.default_rng(seed)
    names = sorted(f'{c.id}_C1.jpg' for c in Cell.parse('Z33-031311102213').children(17)[:n])
    rows = pa.table(dict(chip=names, date=pa.nulls(n, pa.date32()), valid=pa.nulls(n, pa.float32()), clear=pa.nulls(n, pa.float32()), off_nadir=pa.nulls(n, pa.float32())))
    v = rng.normal(size=(n,d))
    return make_table(rows, v/np.linalg.norm(v, axis=1, keepdims=True), rng.random((n,len(classes))) if classes else None, classes)

META = dict(encoder='e', encoder_hash='0'*64, dim=8, classes=None)

def test_columns_and_their_types_are_as_promised(done):
    for f in list_files(done):
        t = pq.read_table(f.path, partitioning=None)
        assert t.schema.equals(embedding_schema(512)) and t.column_names[:7]==['chip','place','cell','zone','catalog_id','date','valid'] and t['chip'].to_pylist()==sorted(t['chip'].to_pylist())
        assert set(t['cell'].to_pylist())=={f"Z33-{Path(f.path).name.partition('_')[0]}"} and set(t['zone'].to_pylist())=={33}
        facts = embedding_facts(f.path)
        assert facts['credits']==['imagery by somebody', 'weights by nobody'] and facts['unreadable']==[] and facts['rows']==len(t)

def test_geopandas_and_duckdb_read_it(done):
    import duckdb, geopandas
    f = list_files(done)[0].path
    g = geopandas.read_parquet(f)
    assert g.crs=='OGC:CRS84' and g.geometry.is_valid.all() and (g.geometry.bounds.minx<g.lon).all() and (g.lon<g.geometry.bounds.maxx).all()
    want = np.array([Cell.parse(p).lonlat for p in g.place])
    assert np.abs(want-g[['lon','lat']].to_numpy()).max()<1e-9
    assert all(a.symmetric_difference(Cell.parse(p).geometry_wgs84()).area<1e-6*a.area for a,p in list(zip(g.geometry, g.place))[::7])
    assert duckdb.sql(f"select count(*), min(lon) from '{f}'").fetchall()==[(len(g), g.lon.min())]

@pytest.mark.parametrize('n,d', [(1,1), (3,512), (1024,64), (40000,4), (0,8)])
def test_mapped_vectors_are_the_decoded_ones(tmp_path, n, d):
    rng = np.random.default_rng(0)
    t = invented(min(n, 1024), d)
    if n>1024: t = pa.concat_tables([t]*(n//1024+1)).slice(0, n).combine_chunks()
    (tmp_path/'a.parquet').write_bytes(table_bytes(t, META|dict(dim=d)))
    assert np.array_equal(open_vectors(tmp_path/'a.parquet'), as_array(pq.read_table(tmp_path/'a.parquet')['vector']))
    if 0<n<=16384: assert isinstance(open_vectors(tmp_path/'a.parquet'), np.memmap)
    rows, v = read_embeddings(tmp_path/'a.parquet')
    assert v.shape==(n,d) and len(rows)==n

def test_files_of_other_programs_are_decoded(tmp_path):
    t = invented(300, 16)
    data = table_bytes(t, META|dict(dim=16))
    meta = pq.read_schema(io.BytesIO(data)).metadata
    for k,kw in enumerate((dict(compression='snappy'), dict(compression='NONE', data_page_size=1000), dict(compression='NONE', use_dictionary=True), dict(data_page_version='2.0', compression='NONE'), dict(row_group_size=70))):
        pq.write_table(t.replace_schema_metadata(meta), tmp_path/f'{k}.parquet', **kw)
        assert np.array_equal(open_vectors(tmp_path/f'{k}.parquet'), as_array(t['vector'])), kw
    assert len(read_embeddings(tmp_path)[1])==1500

def test_damage_is_named(tmp_path):
    data = table_bytes(invented(50), META)
    for cut in (0, 3, 100, len(data)//2, len(data)-1):
        (tmp_path/'a.parquet').write_bytes(data[:cut])
        with pytest.raises(CorruptError, match='a.parquet'): read_embeddings(tmp_path)
    for text in (b'PAR1'*9, data[:200]+data[900:]):
        (tmp_path/'a.parquet').write_bytes(text)
        with pytest.raises(CorruptError, match='a.parquet'): read_embeddings(tmp_path)
    rng = np.random.default_rng(1)
    for at in rng.integers(4, len(data), 60): # whatever byte: an error of ours, or rows that are in order
        bad = bytearray(data); bad[at] ^= 1+int(rng.integers(255))
        (tmp_path/'a.parquet').write_bytes(bad)
        try: rows, v = read_embeddings(tmp_path)
        except (CorruptError, InputError): continue
        assert np.isfinite(v).all() and v.shape[1]==8

def test_pages_carry_checksums(tmp_path):
    data = table_bytes(invented(200, 16, ['a','b']), META|dict(dim=16, classes=['a','b']))
    m = pq.read_metadata(io.BytesIO(data))
    for i in range(m.num_columns):
        c = m.row_group(0).column(i)
        bad = bytearray(data)
        bad[c.data_page_offset+c.total_compressed_size-(c.data_page_offset-(c.dictionary_page_offset or c.data_page_offset))-1] ^= 1
        with pytest.raises(OSError, match='checksum'): pq.read_table(io.BytesIO(bad), page_checksum_verification=True)
    (tmp_path/'a.parquet').write_bytes(data)
    assert isinstance(open_vectors(tmp_path/'a.parquet'), np.memmap)

def test_vectors_of_two_encoders_or_of_odd_length_are_refused(tmp_path):
    (tmp_path/'a.parquet').write_bytes(table_bytes(invented(5), META))
    for k,(t,meta) in enumerate([(invented(5), META|dict(encoder_hash='1'*64)), (invented(5, 9), META|dict(dim=9, encoder_hash='2'*64))]):
        (tmp_path/'b.parquet').write_bytes(table_bytes(t, meta))
        with pytest.raises(InputError, match='two encoders'): read_embeddings(tmp_path)
    t = invented(5)
    for v,why in ((np.full((5,8), np.nan), 'not finite'), (np.full((5,8), 3.), 'of length'), (np.zeros((5,8)), 'of length')):
        b = t.set_column(t.column_names.index('vector'), t.schema.field('vector'), [pa.FixedSizeListArray.from_arrays(pa.array(v.astype('f2').ravel()), type=t.schema.field('vector').type)])
        (tmp_path/'b.parquet').write_bytes(table_bytes(b, META))
        with pytest.raises(CorruptError, match=why): read_embeddings(tmp_path)
    pq.write_table(pa.table(dict(a=[1])), tmp_path/'b.parquet')
    with pytest.raises(CorruptError, match='not a file of embeddings'): read_embeddings(tmp_path)
    with pytest.raises(MissingError): read_embeddings(tmp_path/'none.parquet')

# ---- runs

def test_twice_is_once_and_shares_make_the_whole(town, done, tmp_path):
    for i in (1, 0): assert encode(town/'encoder', town/'chips', tmp_path, shard=(i,2), **CPU, credits='imagery by somebody').done==1
    assert hashes(tmp_path)==hashes(done)
    again = encode(town/'encoder', town/'chips', tmp_path, **CPU)
    assert (again.done, again.skipped, again.exit_code)==(0, 2, 0) and hashes(tmp_path)==hashes(done)
    for bad in ((2,2), (-1,2), (0,0)):
        with pytest.raises(InputError, match='shard'): encode(town/'encoder', town/'chips', tmp_path, shard=bad, **CPU)

def test_workers_and_batches_change_nothing_that_counts(town, done, tmp_path):
    encode(town/'encoder', town/'chips', tmp_path/'a', device='cpu', workers=2, batch_size=7)
    a, b = read_embeddings(tmp_path/'a'), read_embeddings(done)
    assert a[0]['chip']==b[0]['chip'] and np.abs(a[1]-b[1]).max()<2e-3

def test_only_a_new_date_is_encoded(town, done, tmp_path):
    shutil.copytree(town/'chips/index', tmp_path/'chips/index')
    index = sorted((tmp_path/'chips/index').rglob('*.parquet'))
    late = index[1].read_bytes(); index[1].unlink()
    go = lambda: encode(town/'encoder', tmp_path/'chips', tmp_path/'out', ard=town/'ard', **CPU)
    assert go().done==1
    before = hashes(tmp_path/'out')
    index[1].write_bytes(late)
    s = go()
    assert (s.done, s.skipped)==(1,1) and before.items()<=hashes(tmp_path/'out').items() and len(hashes(tmp_path/'out'))==2
    index[0].write_bytes(index[0].read_bytes()[:900])
    s = go()
    assert s.exit_code==1 and s.skipped==1 and s.failures[0][0]==index[0].name

def test_chips_are_chosen_by_what_was_seen(town, tmp_path):
    s = encode(town/'encoder', town/'chips', tmp_path, valid=1, clear=.99, **CPU)
    rows = read_embeddings(tmp_path)[0]
    ix = [read_chip_index(p) for p in ChipStore(town/'chips').indexes()]
    want = sorted(c for i in ix for c,v,q in zip(i['chip'], i['valid'], i['clear']) if v>=1 and not q<.99)
    assert sorted(rows['chip'].to_pylist())==want and 0<len(want)<s.extra['chips']+s.extra['left out']
    assert encode(town/'encoder', town/'chips', tmp_path, valid=1, clear=.99, **CPU).skipped==2
    empty = encode(town/'encoder', town/'chips', tmp_path/'none', valid=1, clear=1, level=17, zone=33, batch_size=5, **CPU)
    assert empty.exit_code==0
    with pytest.raises(MissingError): encode(town/'encoder', town/'chips', tmp_path, zone=34, **CPU)

def test_a_tile_without_a_chosen_chip_is_done_too(town, tmp_path):
    class Grey(torch.nn.Module):
        def forward(self, x): return x.mean((2,3))+.1
    register_encoder('grey', Grey)
    index = read_chip_index(ChipStore(town/'chips').indexes()[0])
    from imagesim.read import ChipIndex, write_chip_index
    t = index.table.set_column(index.table.column_names.index('valid'), 'valid', pa.array(np.full(len(index), .2, 'f4')))
    write_chip_index(tmp_path/'chips/index/z17/zone=33/031111123030_X.parquet', ChipIndex(t, index.meta))
    spec = dict(registered='grey', size=32)
    s = encode(spec, tmp_path/'chips', tmp_path/'out', ard=town/'ard', valid=.5, **CPU)
    assert (s.done, s.extra['chips'], s.exit_code)==(1,0,0) and len(read_embeddings(tmp_path/'out')[0])==0
    assert encode(spec, tmp_path/'chips', tmp_path/'out', ard=town/'ard', valid=.5, **CPU).skipped==1

def test_another_encoder_of_the_same_name(town, tmp_path):
    encode(town/'encoder', town/'chips', tmp_path, **CPU)
    before, other = hashes(tmp_path), SPEC|dict(layer='features.7')
    with pytest.raises(InputError, match='another encoder named'): encode(other, town/'chips', tmp_path, **CPU)
    assert hashes(tmp_path)==before
    assert encode(other, town/'chips', tmp_path, overwrite=True, **CPU).done==2 and read_embeddings(tmp_path)[1].shape[1]==256
    assert encode(other|dict(name='second'), town/'chips', tmp_path, **CPU).done==2

def test_a_projection_and_classes_reach_the_file(town, tmp_path):
    v = encode_pictures(SPEC, [np.random.default_rng(i).integers(0, 256, (70,70,3), dtype='u1') for i in range(20)], device='cpu')[0]
    encode(make_bundle(SPEC|dict(name='small'), tmp_path/'b', projection=fit_pca(v, 6)), town/'chips', tmp_path/'out', **CPU)
    assert read_embeddings(tmp_path/'out')[1].shape[1]==6
    class Two(torch.nn.Module):
        def forward(self, x): return x.flatten(2).mean(2), x.mean((2,3))[:,:2].clamp(0, 1)
    register_encoder('two', Two)
    encode(dict(registered='two', size=32, classes=['r','g']), town/'chips', tmp_path/'two', **CPU)
    rows, v = read_embeddings(tmp_path/'two')
    p = as_array(rows['probs']).astype('f4')
    assert p.shape==(len(v),2) and np.allclose(p/np.linalg.norm(p, axis=1, keepdims=True), v[:,:2]/np.linalg.norm(v[:,:2], axis=1, keepdims=True), atol=5e-3)

def damaged(town, dest, names):
    "The chips of a town as loose jpgs with an index beside them, some of them damaged"
    chip_ard(town/'ard', dest/'chips/33', proc=1)
    for n in names: (dest/'chips/33'/n).write_bytes(b'not a picture')

def test_unreadable_chips_are_listed_once_and_again(town, done, tmp_path):
    names = sorted(read_embeddings(done)[0]['chip'].to_pylist())
    damaged(town, tmp_path, bad := [names[1], names[-1]])
    for k in range(2): # the second run has nothing to do, and still says what is wrong
        s = encode(town/'encoder', tmp_path/'chips', tmp_path/'out', **CPU)
        assert s.exit_code==1 and sorted(n for n,_ in s.failures)==bad and s.extra['unreadable']==2 and (s.done, s.skipped)==((2,0) if k==0 else (0,2))
    got, want = read_embeddings(tmp_path/'out'), read_embeddings(done)
    assert got[0]['chip'].to_pylist()==[n for n in want[0]['chip'].to_pylist() if n not in bad]
    keep = np.isin(np.array(want[0]['chip'].to_pylist()), bad, invert=True)
    assert np.abs(got[1]-want[1][keep]).max()<2e-3

def test_a_chip_that_was_mended_or_replaced_is_noticed(town, tmp_path):
    "By trying what could not be read, whatever size and time say; and by size and time, whatever could be read"
    index = sorted((town/'chips/index').rglob('*.parquet'))[0]
    from imagesim.read import ChipIndex, write_chip_index
    ix, store = read_chip_index(index), ChipStore(town/'chips')
    names = [n for n,v in zip(ix['chip'], ix['valid']) if v>0][:4]
    t = ix.table.filter(pa.array(np.isin(ix['chip'], names)))
    write_chip_index(tmp_path/'chips'/index.relative_to(town/'chips'), ChipIndex(t, ix.meta|dict(jpgs=True)))
    (tmp_path/'chips/33').mkdir()
    data = dict(zip(names, store.read(names)))
    for n,d in data.items(): (tmp_path/'chips/33'/n).write_bytes(d)
    first = tmp_path/'chips/33'/names[0]
    first.write_bytes(b'x'*len(data[names[0]])); os.utime(first, (9,9))
    go = lambda: encode(town/'encoder', tmp_path/'chips', tmp_path/'out', **CPU)
    assert [(s.done, s.skipped, s.extra['unreadable']) for s in (go(), go())]==[(1,0,1), (0,1,1)]
    first.write_bytes(data[names[0]]); os.utime(first, (9,9))
    s = go()
    assert (s.done, s.extra['unreadable'], s.exit_code)==(1,0,0) and len(read_embeddings(tmp_path/'out')[1])==4 and go().skipped==1
    before = read_embeddings(tmp_path/'out')[1]
    (tmp_path/'chips/33'/names[1]).write_bytes(data[names[2]])
    assert go().done==1 and np.abs(read_embeddings(tmp_path/'out')[1][1]-before[2]).max()<2e-3
    f = Path(list_files(tmp_path/'out')[0].path)
    meta = json.loads(pq.read_schema(f).metadata[b'imagesim'])
    del meta['jpgs']
    f.write_bytes(table_bytes(pq.read_table(f, partitioning=None), meta)) # a file from before that was kept
    assert go().skipped==1

def test_a_tile_of_which_nothing_can_be_read_fails_and_is_tried_again(town, tmp_path):
    shutil.copytree(town/'ard', tmp_path/'ard')
    tif = sorted((tmp_path/'ard').rglob('*-visual.tif'))[0]
    tif.rename(tif.with_suffix('.away'))
    go = lambda: encode(town/'encoder', town/'chips', tmp_path/'out', ard=tmp_path/'ard', **CPU)
    s = go()
    assert (s.done, s.failed, s.exit_code)==(1,1,1) and 'is not there' in s.failures[0][1] and len(hashes(tmp_path/'out'))==1
    tif.with_suffix('.away').rename(tif)
    s = go()
    assert (s.done, s.skipped, s.exit_code)==(1,1,0)

def test_a_network_that_fails_on_one_chip(town, tmp_path):
    class Moody(torch.nn.Module):
        def forward(self, x):
            v = x.mean((2,3))+.1
            if len(v)>3: v[2] = float('nan')
            return v
    register_encoder('moody', Moody)
    s = encode(dict(registered='moody', size=32), town/'chips', tmp_path, batch_size=64, **CPU)
    assert s.exit_code==1 and s.extra['unreadable']==2 and all('no finite vector' in why for _,why in s.failures) and np.isfinite(read_embeddings(tmp_path)[1]).all()

def test_loose_jpgs_without_an_index(town, done, tmp_path):
    names, store = read_embeddings(done)[0]['chip'].to_pylist()[:6], ChipStore(town/'chips')
    for n in names: (tmp_path/n).write_bytes(store.read([n])[0])
    (tmp_path/'holiday.jpg').write_bytes(b'x')
    s = encode(town/'encoder', tmp_path, tmp_path/'out', **CPU)
    assert s.exit_code==0 and s.extra['chips']==6 and encode(town/'encoder', tmp_path, tmp_path/'out', **CPU).skipped==1
    os.utime(tmp_path/names[0], (1,1))
    assert encode(town/'encoder', tmp_path, tmp_path/'out', **CPU).done==1

def test_from_and_to_a_bucket(town, done, bucket, tmp_path):
    from imagesim.infra import sync
    sync(town/'chips/index', f'{bucket}/chips/index')
    s = encode(town/'encoder', f'{bucket}/chips', f'{bucket}/emb', ard=town/'ard', **CPU)
    assert s.exit_code==0 and s.done==2 and encode(town/'encoder', f'{bucket}/chips', f'{bucket}/emb', ard=town/'ard', **CPU).skipped==2
    a, b = read_embeddings(f'{bucket}/emb'), read_embeddings(done)
    assert a[0].equals(b[0]) and np.array_equal(a[1], b[1])

KILLED = '''
import sys, time, torch
from imagesim.bundle import register_encoder
from imagesim.encode import encode
class Slow(torch.nn.Module):
    def forward(self, x):
        if len(x)>1: time.sleep(.6)
        return x.mean((2,3))+.1
register_encoder('slow', Slow)
encode(dict(registered='slow', size=32), *sys.argv[1:3], ard=sys.argv[3], device='cpu', workers=int(sys.argv[4]), batch_size=4)
'''

@register_encoder('slow')
class Slow(torch.nn.Module):
    def forward(self, x): return x.mean((2,3))+.1

@pytest.mark.parametrize('workers', [0, 2])
def test_kill_9_while_encoding(town, tmp_path, workers):
    env, go = {**os.environ, 'PYTHONPATH':str(ROOT)}, [str(town/'chips'), str(tmp_path/'out'), str(town/'ard'), str(workers)]
    p = subprocess.Popen([sys.executable, '-c', KILLED, *go], env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out := list((tmp_path/'out').rglob('[0-9]*.parquet'))) and p.poll() is None: time.sleep(.02)
    os.killpg(p.pid, signal.SIGKILL); p.wait()
    first = hashes(tmp_path/'out')
    assert len(out)==len(first)==1, 'it was killed between two tiles'
    run = lambda out: encode(dict(registered='slow', size=32), town/'chips', out, ard=town/'ard', batch_size=4, **CPU)
    s = run(tmp_path/'out')
    assert (s.done, s.skipped)==(1,1) and run(tmp_path/'whole').done==2
    assert first.items()<=hashes(tmp_path/'out').items() and hashes(tmp_path/'out')==hashes(tmp_path/'whole')

# ---- pictures and comparisons

def test_pictures(town, tmp_path):
    a = np.random.default_rng(0).integers(0, 256, (64,64,3), dtype='u1')
    v, p = encode_pictures(SPEC, [a]*5, batch_size=2, device='cpu')
    assert v.shape==(5,512) and p is None and np.allclose(v, load_encoder(SPEC, 'cpu').encode(a.transpose(2,0,1)[None])[0], atol=1e-5)
    assert encode_pictures(SPEC, [], device='cpu')[0].shape==(0,512)
    for bad in (a[...,0], a/255., a[...,:2], a[:0], a[:,:0]):
        with pytest.raises(InputError, match='picture 0'): encode_pictures(SPEC, [bad], device='cpu')
    with pytest.raises(MissingError): encode_pictures(SPEC, [tmp_path/'no.jpg'], device='cpu')

def test_comparing(town):
    t = compare_encoders([SPEC, SPEC|dict(size=96, name='larger')], town/'chips', n=40, device='cpu')
    assert list(t['encoder'])==['squeezenet1_0','larger'] and t['same place first'].between(0, 1).all() and t['own tile in 10'].gt(0).all() and t['pictures/s'].gt(0).all()
    with pytest.raises(MissingError): compare_encoders([SPEC], town/'nothing')
    with pytest.raises(InputError): compare_encoders([SPEC], town/'chips', labels={})

def test_it_runs_where_geometry_libraries_are_missing(town, tmp_path):
    code = f'''import sys
for m in ('rasterio','geopandas','shapely','pyproj','duckdb','maxar_ard_grid','osmium','faiss','fastapi','s3fs'): sys.modules[m] = None
from imagesim.encode import encode, read_embeddings
print(encode({str(town/"encoder")!r}, {str(town/"chips")!r}, {str(tmp_path/"out")!r}, device='cpu', workers=0).done)'''
    r = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert r.stdout.strip()=='2', r.stderr
