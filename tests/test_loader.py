"""The loader: tables that are refused, chips that are missing, order and resume, worker processes, several ranks"""
import io, json, os, subprocess, sys
from pathlib import Path

import numpy as np, pandas as pd, pyarrow as pa, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from imagesim.ard import Cell
from imagesim.dataset import invent_delivery, make_dataset
from imagesim.infra import CorruptError, InputError, MissingError, write_bytes
from imagesim.loader import BatchOrder, SkywayDataset, TrainingTable, chip_loader, decode_batch, decode_chip, open_dataset
from imagesim.read import INDEX_SCHEMA, ChipIndex, index_path, write_chip_index

CELL = 'Z33-031111123030'
CLASSES = ['houses', 'water', 'forest']

def jpg(seed=0, px=128, mode='RGB', **kw):
    "A picture with coarse and fine structure"
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (8,8,3)).astype('u1')
    im = np.asarray(Image.fromarray(small).resize((px,px), Image.Resampling.BICUBIC)).astype('i2')+rng.integers(-12, 12, (px,px,1))
    out = io.BytesIO()
    Image.fromarray(im.clip(0,255).astype('u1')).convert(mode).save(out, 'JPEG', quality=80, **kw)
    return out.getvalue()

PLACES = [f'{CELL}{i:05}' for i in (0,1,2,3,10,11,12,13,20,21)]
NAMES = [f'{p}_CAT{d}.jpg' for p in PLACES for d in (0,1)]

@pytest.fixture(scope='module')
def chips(tmp_path_factory):
    "Ten places on two dates: CAT0 as jpgs, CAT1 virtual, one after the other in a file that plays the COG"
    root = tmp_path_factory.mktemp('loader')
    (root/'chips/33').mkdir(parents=True)
    for d in (0,1):
        data = [jpg(2*i+d) for i in range(len(PLACES))]
        at = np.cumsum([0]+[len(b) for b in data])
        rel = f'33/{CELL[4:]}/2020-0{d+1}-01/CAT{d}-visual.tif'
        if d:
            (root/'ard'/rel).parent.mkdir(parents=True)
            (root/'ard'/rel).write_bytes(b''.join(data))
        else:
            for p,b in zip(PLACES, data): (root/f'chips/33/{p}_CAT0.jpg').write_bytes(b)
        n = len(PLACES)
        t = pa.table(dict(chip=[f'{p}_CAT{d}.jpg' for p in PLACES], path=[rel]*n, offset=at[:-1] if d else [None]*n, length=np.diff(at) if d else [None]*n, valid=[1.]*n,
                          clear=[None]*n, date=[pd.Timestamp(f'2020-0{d+1}-01').date()]*n, off_nadir=[10.]*n, view_azimuth=[0.]*n), schema=INDEX_SCHEMA)
        write_chip_index(index_path(root/'chips/index', Cell.parse(CELL), f'CAT{d}'),
                         ChipIndex(t, dict(jpgs=not d, cog=rel, delivery=str(root/'ard'), cog_size=int(at[-1]), jpeg_tables='', photometric=6)))
    return root

def frame(names=NAMES, seed=0):
    s = np.random.default_rng(seed).integers(-1, 2, (len(names), len(CLASSES)))
    return pd.DataFrame(dict(Feature=names) | {c:pd.arrays.IntegerArray(np.maximum(s[:,i],0), s[:,i]<0) for i,c in enumerate(CLASSES)})

def rows_of(loader): return [b.row.tolist() for b in loader]

# ---------------------------------------------------------------- pictures

def test_decoded_to_size_is_close_to_the_whole_picture_reduced():
    for seed in range(5):
        data = jpg(seed, 512)
        want = torch.nn.functional.interpolate(decode_chip(data)[None].float(), (224,224), mode='bilinear', antialias=True)[0]
        got = decode_chip(data, 224).float()
        assert (got-want).abs().mean()<2.5 and abs((got-want).mean())<.3
        shifted = torch.roll(want, 1, dims=2) # half a pixel off would be seen
        assert (got-want).abs().mean()<.6*(got-shifted).abs().mean()

@pytest.mark.parametrize('px,size', [(512,224), (512,256), (512,64), (256,224), (224,224), (100,224), (130,60)])
def test_every_size(px, size): assert decode_chip(jpg(1, px), size).shape==(3,size,size)

def test_other_pictures():
    "Grey, CMYK, progressive, PNG, no square"
    assert decode_chip(jpg(1, 512, 'L'), 224).shape==decode_chip(jpg(1, 512, 'CMYK'), 224).shape==(3,224,224)
    assert decode_chip(jpg(1, 200, 'L'), 224).shape==decode_chip(jpg(1, 200, 'CMYK'), 224).shape==(3,224,224)
    a, b = decode_chip(jpg(1, 512), 224), decode_chip(jpg(1, 512, progressive=True), 224)
    assert (a.float()-b.float()).abs().mean()<.1
    out = io.BytesIO()
    Image.fromarray(np.zeros((40,30,4),'u1')+9).save(out, 'PNG')
    assert decode_chip(out.getvalue(), 16).shape==(3,16,16) and decode_chip(out.getvalue()).shape==(3,40,30)

@pytest.mark.parametrize('size', [None, 32, 64, 200])
def test_what_is_no_picture_is_named(size):
    good = jpg(3)
    for bad in (b'', b'\xff\xd8', b'\xff\xd8\xff', good[:200], good[:len(good)//2], b'<html>', b'\0'*1000, good[:2]+b'\xff\xc0\0\x11\x08\xff\xff\xff\xff'+good[20:]):
        with pytest.raises(CorruptError, match='^x.jpg: '): decode_chip(bad, size, 'x.jpg')

def test_damaged_at_random_never_anything_else():
    good, rng = jpg(3, 64), np.random.default_rng(0)
    for _ in range(150):
        b = bytearray(good)
        for i in rng.integers(0, len(b), 4): b[i] = rng.integers(256)
        for size in (None, 24):
            try: assert decode_chip(bytes(b), size).dtype==torch.uint8
            except CorruptError: pass

def test_decoding_a_batch_on_the_cpu():
    data = [torch.tensor(list(d), dtype=torch.uint8) for d in (jpg(0), jpg(1)[:500], b"", jpg(2, 64, "L"))]
    bad = {}
    x = decode_batch(data, 32, 'cpu', bad)
    assert x.shape==(4,3,32,32) and list(bad)==[1] and not x[1:3].any() and x[0].any() and x[3].any()
    with pytest.raises(CorruptError, match='picture 1'): decode_batch(data, 32, 'cpu')

# ---------------------------------------------------------------- tables

def test_csv_parquet_and_frame_say_the_same(tmp_path):
    f = frame()
    f.to_csv(tmp_path/'a.csv', index=False); f.to_parquet(tmp_path/'a.parquet'); f.astype({c:'float' for c in CLASSES}).to_parquet(tmp_path/'b.parquet')
    (tmp_path/'c.csv').write_text('\ufeff'+(tmp_path/'a.csv').read_text().replace('\n', '\r\n'), newline='')
    f.astype({c:'float' for c in CLASSES}).to_csv(tmp_path/'d.csv', index=False)
    want = TrainingTable.from_csv(f)
    assert want.states.tolist()==f[CLASSES].fillna(-1).astype(int).to_numpy().tolist()
    for n in ('a.csv','a.parquet','b.parquet','c.csv','d.csv'):
        t = TrainingTable.from_csv(tmp_path/n)
        assert (t.features, t.classes)==(NAMES, CLASSES) and torch.equal(t.states, want.states), n

@pytest.mark.parametrize('text,why', [('', 'empty file'), ('Feature,a\n', 'no rows'), ('a,Feature\n1,x.jpg\n', 'begins with'), ('Feature\nx.jpg\n', 'no column of a class'),
    ('Feature,a\nx.jpg,2\n', "'a' of 'x.jpg' is '2'"), ('Feature,a\nx.jpg,yes\n', 'no class, name it in ignore'), ('Feature,a\nx.jpg,1\nx.jpg,1\n', r'twice \(rows 1 and 2\)'),
    ('Feature,a\n../x.jpg,1\n', 'not a safe name'), ('Feature,a\n/etc/x.jpg,1\n', 'not a safe name'), ('Feature,a\na\\x.jpg,1\n', 'not a safe name'), ('Feature,a\n..,1\n', 'not a safe name'),
    ('Feature,a\na/../x.jpg,1\n', 'not a safe name'), ('Feature,a\n,1\n', 'Feature is empty'), ('Feature,a,a\nx.jpg,1,1\n', 'two columns'), ('Feature,a\nx.jpg,1,1\n', 'not a table'),
    ('Feature,present,unmapped\nx.jpg,[],[]\n', 'dense')])
def test_bad_tables(tmp_path, text, why):
    (tmp_path/'t.csv').write_text(text)
    with pytest.raises((InputError, CorruptError), match=why): TrainingTable.from_csv(tmp_path/'t.csv')

def test_bad_files(tmp_path):
    (tmp_path/'t.parquet').write_bytes(b'PAR1')
    with pytest.raises(CorruptError, match='not a Parquet'): TrainingTable.from_csv(tmp_path/'t.parquet')
    (tmp_path/'t.csv').write_bytes('Feature,a\nä.jpg,1\n'.encode('latin-1'))
    with pytest.raises((InputError, CorruptError)): TrainingTable.from_csv(tmp_path/'t.csv')
    with pytest.raises(MissingError): TrainingTable.from_csv(tmp_path/'no.csv')
    with pytest.raises(InputError, match='end with'): TrainingTable.from_csv(tmp_path/'t.txt')

def test_splits_of_ones_own(tmp_path):
    f = frame()
    part = ['train']*12+['val']*8
    f.assign(part=part, scene='x', w=2.5).to_csv(tmp_path/'t.csv', index=False)
    t = open_dataset(tmp_path/'t.csv', split='part', ignore=['scene'], weight='w')
    assert t.splits==['train','val'] and t.rows('val').tolist()==list(range(12,20)) and set(t.weights)=={2.5}
    f.to_csv(tmp_path/'u.csv', index=False)
    pd.DataFrame(dict(Feature=NAMES, split=part)).sample(frac=1, random_state=0).to_csv(tmp_path/'s.csv', index=False)
    u = open_dataset(tmp_path/'u.csv', split=str(tmp_path/'s.csv'))
    assert u.split.tolist()==t.split.tolist() and u.classes==CLASSES
    with pytest.raises(InputError, match="no split 'test'"): t.rows('test')
    with pytest.raises(InputError, match='no column'): open_dataset(tmp_path/'t.csv', split='prat')
    with pytest.raises(InputError, match='has no splits'): TrainingTable.from_csv(f).rows('train')

@pytest.fixture(scope='module')
def version(tmp_path_factory):
    root = tmp_path_factory.mktemp('version')
    invent_delivery(root, [Cell.parse(CELL)], classes=dict(cropland=.5, forest=.3, houses=.2), seed=1)
    return make_dataset('d', root/'chips', root/'labels', out=root/'datasets', weights={'class':'balanced'})

def test_a_version(version, tmp_path):
    from imagesim.encoding import read_labels_table
    t = open_dataset(version.path)
    f = read_labels_table(version.file('sparse.parquet'))
    assert t.features==f.Feature.tolist() and t.classes==version.classes and len(t)==len(version)
    assert t.states.tolist()==f[t.classes].fillna(-1).astype(int).to_numpy().tolist()
    assert {s:len(t.rows(s)) for s in t.splits}=={s:c['chips'] for s,c in version.manifest['counts'].items() if c['chips']}
    assert t.schema['hash']==version.manifest['inputs']['schema']['hash'] and t.content==version.manifest['content'] and np.ptp(t.weights)>0
    assert open_dataset(Path(version.path).parent).version==t.version

@pytest.mark.parametrize('file', ['sparse.parquet', 'splits.parquet', 'schema.toml', 'manifest.json', 'dense.parquet'])
def test_a_version_that_somebody_touched(version, tmp_path, file):
    import shutil
    shutil.copytree(version.path, tmp_path/'v')
    p = tmp_path/'v'/file
    b = bytearray(p.read_bytes())
    if file=='dense.parquet': b += b'x' # not used here, so only its size is compared
    else: b[len(b)//2] ^= 1
    p.write_bytes(b)
    with pytest.raises(CorruptError, match=file.split('.')[0]): open_dataset(tmp_path/'v')
    p.unlink()
    with pytest.raises(MissingError): open_dataset(tmp_path/'v')

# ---------------------------------------------------------------- chips

def test_samples(chips):
    f = frame()
    ds = SkywayDataset(f, chips/'chips', size=64, rows=range(1,20))
    assert ds.check()==[] and ds.check(decode=True)==[] and len(ds)==19
    for i in (0, 7, -1):
        s = ds[i]
        r = range(1,20)[i]
        want = decode_chip(jpg(r), 64)
        assert torch.equal(s.image, want) and s.row==r
        assert s.mask.tolist()==f[CLASSES].iloc[r].notna().tolist() and s.label.tolist()==f[CLASSES].iloc[r].fillna(0).tolist()
    assert ds.places.tolist()==[ds.places[0].item()]+[p for p in dict.fromkeys(ds.places[1:].tolist()) for _ in (0,1)] and len(set(ds.places.tolist()))==10
    with pytest.raises(IndexError): ds[19]
    image, label, *_ = ds[0]
    assert image.dtype==torch.uint8 and label.dtype==torch.float32

def test_a_plain_dataloader_works_too(chips):
    ds = SkywayDataset(frame(), chips/'chips', transforms=lambda x: x[:, :16, :16].float()/255, size=64)
    b = next(iter(DataLoader(ds, batch_size=6)))
    assert b.image.shape==(6,3,16,16) and b.row.tolist()==list(range(6)) and b.mask.dtype==torch.bool and b.place.dtype==torch.int64

def test_plain_folder(tmp_path):
    for i in range(5): (tmp_path/f'p{i}.jpg').write_bytes(jpg(i, 60+i))
    t = pd.DataFrame(dict(Feature=[f'p{i}.jpg' for i in range(6)], a=1))
    ds = SkywayDataset(t, tmp_path, size=32, unreadable='mask')
    assert [n for n,_ in ds.check()]==['p5.jpg'] and ds[5].row==-6 and ds.places.tolist()==list(range(6))
    with pytest.raises(InputError, match='different sizes'): next(iter(chip_loader(SkywayDataset(t[:5], tmp_path), 5, workers=0)))
    with pytest.raises(InputError, match='no chip name'): SkywayDataset(pd.DataFrame(dict(Feature=[NAMES[0],'p0.jpg'], a=1)), tmp_path)

def test_bad_arguments(chips):
    f, c = frame(), chips/'chips'
    for kw,why in ((dict(rows=[20]), 'no row'), (dict(rows=[]), 'at least one'), (dict(rows='train'), 'no splits'), (dict(size=3), '8 to 4096'), (dict(classes=CLASSES[::-1]), 'another order'),
                   (dict(classes=CLASSES[:2]), 'only in the table: forest'), (dict(unreadable='no'), "'raise' or 'mask'"), (dict(raw=True, transforms=abs), 'raw')):
        with pytest.raises(InputError, match=why): SkywayDataset(f, c, **kw)
    from torchvision import transforms as T
    with pytest.raises(InputError, match='ToDtype'): SkywayDataset(f, c, T.Compose([T.ToTensor()]))
    with pytest.raises(MissingError, match='no such folder'): SkywayDataset(f, chips/'nowhere')

@pytest.fixture
def spoilt(chips, tmp_path):
    import shutil
    for sub in ('chips','ard'): shutil.copytree(chips/sub, tmp_path/sub)
    (tmp_path/f'chips/33/{NAMES[0]}').unlink()
    (tmp_path/f'chips/33/{NAMES[2]}').write_bytes(jpg(2)[:900])
    return tmp_path

@pytest.mark.parametrize('raw', [False, True])
@pytest.mark.parametrize('workers', [0, 2])
def test_missing_and_torn_chips(spoilt, workers, raw):
    ds = SkywayDataset(frame(), spoilt/'chips', size=32, unreadable='mask', ard=spoilt/'ard', raw=raw)
    assert [n for n,_ in ds.check()]==[NAMES[0]] and [n for n,_ in ds.check(decode=True)]==[NAMES[0],NAMES[2]]
    loader = chip_loader(ds, 8, workers=workers, start='fork' if workers else None, decode_on='cpu')
    got = list(loader)
    rows, mask, image = (torch.cat([getattr(b,k) for b in got]) for k in ('row','mask','image'))
    assert rows.tolist()==[-1,1,-3,*range(3,20)] and not mask[[0,2]].any() and not image[[0,2]].any() and image[1].any()
    assert set(loader.unreadable)=={NAMES[0],NAMES[2]} and 'imagesim chip' in loader.unreadable[NAMES[0]] and 'not a readable picture' in loader.unreadable[NAMES[2]]
    strict = SkywayDataset(frame(), spoilt/'chips', size=32, ard=spoilt/'ard', raw=raw)
    with pytest.raises(MissingError) as e: list(chip_loader(strict, 8, workers=workers, start='fork' if workers else None, decode_on='cpu'))
    assert str(e.value).startswith(NAMES[0]) and 'Traceback' not in str(e.value)

def test_a_delivery_that_has_gone(spoilt):
    import shutil
    shutil.rmtree(spoilt/'ard')
    ds = SkywayDataset(frame(), spoilt/'chips', size=32, unreadable='mask', ard=spoilt/'ard')
    bad = dict(ds.check())
    assert set(bad)=={NAMES[0],*NAMES[1::2]} and 'pass ard=' in bad[NAMES[1]]
    assert ds[1].row==-2 and ds[4].row==4

# ---------------------------------------------------------------- order

@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(1,60), st.integers(1,9), st.integers(1,4), st.booleans(), st.booleans(), st.integers(0,3))
def test_ranks_share_the_epoch(n, size, world, shuffle, drop, epoch):
    if drop and n<size: return
    orders = [BatchOrder(n, size, shuffle, 7, drop_last=drop, rank=r, world=world) for r in range(world)]
    for o in orders: o.set_epoch(epoch)
    got = [[list(b) for b in o] for o in orders]
    assert {len(g) for g in got}=={len(orders[0])} and all(len(b)<=size and b for g in got for b in g)
    alone = BatchOrder(n, size, shuffle, 7, drop_last=drop, rank=0, world=1)
    alone.set_epoch(epoch)
    whole = [list(b) for b in alone]
    assert {tuple(b) for g in got for b in g}<={tuple(b) for b in whole}
    if not drop:
        assert {i for g in got for b in g for i in b}==set(range(n)) and sorted(sum(whole, []))==list(range(n))
    else: assert all(len(b)==size for b in whole)

@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(st.integers(1,7), min_size=1, max_size=40), st.integers(2,12), st.integers(0,5))
def test_pairs(dates, size, seed):
    places = np.repeat(np.arange(len(dates)), dates)
    o = BatchOrder(len(places), size, True, seed, places=places)
    rows = o.rows()
    assert sorted(rows.tolist())==list(range(len(places)))
    alone = sum((np.bincount(places[b])==1).sum() for b in map(np.array, o))
    single, batches = sum(d==1 for d in dates), len(o)
    assert alone<=single+2*batches # a batch ends in the middle of a place at most once
    if size%2==0 and all(d%2==0 for d in dates): assert alone==0

def test_weights():
    w = np.array([1., 3, 0, 2.5, .25]*20)
    seen = np.zeros(100)
    for epoch in range(40):
        o = BatchOrder(100, 10, True, 0, weights=w)
        o.set_epoch(epoch)
        n = np.bincount(o.rows(), minlength=100)
        assert n.sum()==100 and (np.abs(n-w*100/w.sum())<1).all()
        seen += n
    assert np.allclose(seen/40, w*100/w.sum(), atol=.35) and np.allclose((seen/40).reshape(20,5).mean(0), (w*100/w.sum())[:5], atol=.1)
    for bad in ([1.]*99, [-1.]*100, [np.nan]*100, [0.]*100):
        with pytest.raises(InputError): BatchOrder(100, 10, True, weights=bad)

def test_weights_of_the_table(version):
    t = open_dataset(version.path)
    ds = SkywayDataset(t, Path(version.path).parents[2]/'chips', rows='train')
    o = chip_loader(ds, 8, shuffle=True, workers=0).batch_sampler
    assert np.array_equal(o.weights, t.weights[t.rows('train')])
    assert chip_loader(ds, 8, shuffle=True, workers=0, weights=False).batch_sampler.weights is None and chip_loader(ds, 8, workers=0).batch_sampler.weights is None

def test_epochs_differ_and_come_again(chips):
    ds = SkywayDataset(frame(), chips/'chips', size=16)
    a, b = chip_loader(ds, 6, True, workers=0, seed=3), chip_loader(ds, 6, True, workers=0, seed=3)
    first, second = rows_of(a), rows_of(a)
    assert first!=second and sorted(sum(second, []))==list(range(20))
    b.set_epoch(1)
    assert rows_of(b)==second and rows_of(chip_loader(ds, 6, True, workers=0, seed=4))!=first

@pytest.mark.parametrize('stop', [0, 1, 3, 4])
@pytest.mark.parametrize('workers', [0, 1])
def test_taken_up_in_the_middle(chips, stop, workers):
    ds = SkywayDataset(frame(), chips/'chips', size=16)
    make = lambda: chip_loader(ds, 5, True, workers=workers, start='fork' if workers else None, pairs=True)
    a = make()
    whole = [rows_of(a), rows_of(a)]
    b, seen = make(), []
    b.set_epoch(0)
    for x in b:
        if len(seen)==stop: break
        seen.append(x.row.tolist())
        state = json.loads(json.dumps(b.state_dict()))
    if not stop: state = dict(make().state_dict())
    c = make()
    c.load_state_dict(state)
    assert c.epoch==(stop==4)
    rest = rows_of(c)
    assert (seen+rest if stop<4 else rest)==whole[stop==4]
    assert rows_of(c)==(whole[1] if stop<4 else rows_of_epoch(make(), 2))
    with pytest.raises(InputError, match='set_epoch'): chip_loader(ds, 4, True, workers=0).load_state_dict(state)

def rows_of_epoch(loader, n):
    loader.set_epoch(n)
    return rows_of(loader)

def test_taken_up_by_another_number_of_ranks(chips):
    ds = SkywayDataset(frame(), chips/'chips', size=16)
    make = lambda r,w: chip_loader(ds, 2, True, workers=0, rank=r, world=w)
    two = [make(r,2) for r in (0,1)]
    seen = []
    for l in two:
        it = iter(l)
        seen += [next(it).row.tolist() for _ in range(3)]
    one = make(0,1)
    one.load_state_dict(two[0].state_dict())
    assert sorted(sum(seen+rows_of(one), []))==list(range(20))

# ---------------------------------------------------------------- processes

SCRIPT = '''
import sys, hashlib, torch
from imagesim.loader import *
def flip(x): return x.flip(-1) if torch.rand(())<.5 else x
def main(table, chips, start):
    ds = SkywayDataset(table, chips, flip, size=32)
    out = []
    for s,w in ((None,0), (start,2)):
        loader = chip_loader(ds, 6, shuffle=True, workers=w, start=s, pairs=True, seed=5)
        state = torch.get_rng_state()
        for epoch in (0,1,0)[:2 if w else 3]: # workers take seconds to start
            loader.set_epoch(epoch)
            out.append(hashlib.sha256(b''.join(t.contiguous().numpy().tobytes() for b in loader for t in (b.image, b.row, b.label, b.mask, b.place))).hexdigest())
        assert w or torch.equal(state, torch.get_rng_state()), 'the random numbers of others were touched'
    assert out[0]==out[2]==out[3] and out[1]==out[4]!=out[0], out
    print('same')
if __name__=='__main__': main(*sys.argv[1:])
'''

@pytest.mark.parametrize('start', ['fork', 'spawn', 'forkserver'])
def test_workers_give_the_same(chips, tmp_path, start):
    "Pictures, order, labels and what random transforms drew"
    frame().to_csv(tmp_path/'t.csv', index=False)
    (tmp_path/'s.py').write_text(SCRIPT)
    p = subprocess.run([sys.executable, 's.py', 't.csv', str(chips/'chips'), start], cwd=tmp_path, capture_output=True, text=True, timeout=600,
                       env={**os.environ, 'PYTHONPATH':str(Path(__file__).resolve().parent.parent)})
    assert p.stdout=='same\n', p.stderr

def test_from_a_bucket(chips, bucket):
    for p in sorted((chips/'chips').rglob('*')):
        if p.is_file(): write_bytes(f'{bucket}/chips/{p.relative_to(chips/"chips")}', p.read_bytes())
    cog = next((chips/'ard').rglob('*.tif'))
    write_bytes(f'{bucket}/ard/{cog.relative_to(chips/"ard")}', cog.read_bytes())
    write_bytes(f'{bucket}/t.csv', frame().to_csv(index=False).encode())
    here, there = SkywayDataset(frame(), chips/'chips', size=16), SkywayDataset(f'{bucket}/t.csv', f'{bucket}/chips', size=16, ard=f'{bucket}/ard')
    assert there.check()==[]
    for workers in (0, 1):
        for a,b in zip(chip_loader(here, 8, workers=0), chip_loader(there, 8, workers=workers, start='fork' if workers else None)): assert torch.equal(a.image, b.image) and torch.equal(a.row, b.row)

def test_needs_no_geometry():
    "What a bare GPU machine has not, and what would make workers slow to start"
    code = "import sys\nfor m in ('rasterio','geopandas','shapely','pyproj','duckdb','osmium','maxar_ard_grid','fastapi','faiss','s3fs'): sys.modules[m] = None\nimport imagesim.loader\nprint(*[m for m in ('matplotlib','torchvision') if m in sys.modules])"
    p = subprocess.run([sys.executable, '-c', code], cwd=Path(__file__).resolve().parent.parent, capture_output=True, text=True)
    assert p.returncode==0 and p.stdout.split()==[], p.stderr+p.stdout

def test_as_lightning_uses_it(chips):
    "It calls `set_epoch` of the batch sampler's sampler, takes as many batches as there are, and never asks for one more"
    ds = SkywayDataset(frame(), chips/'chips', size=16)
    make = lambda: chip_loader(ds, 5, True, workers=0)
    a, seen, states = make(), [], []
    for epoch in (0,1):
        a.batch_sampler.sampler.set_epoch(epoch)
        it = iter(a)
        for _ in range(len(a)):
            seen.append(next(it).row.tolist())
            states.append(a.state_dict())
        it.close()
    for k,state in enumerate(states[:-1]):
        b = make()
        b.load_state_dict(state)
        b.batch_sampler.sampler.set_epoch((k+1)//4)
        assert rows_of(b)==seen[k+1:4*((k+1)//4+1)]
    b = make()
    b.load_state_dict(states[1])
    b.batch_sampler.sampler.set_epoch(1)
    assert rows_of(b)==seen[4:] # another epoch begins at its beginning
