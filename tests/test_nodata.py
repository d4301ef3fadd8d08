"""The no-data index against the masks, on invented and on real tiles; what it must leave alone"""
import io, json, os
from pathlib import Path

import numpy as np, pytest
from PIL import Image

from imagesim.chip import chip_ard
from imagesim.infra import CorruptError, InputError, MissingError, list_files, sync
from imagesim.nodata import black_level, block_means, chip_class, filter_chips, make_nodata_index, missing_blocks, read_nodata_index
from imagesim.read import DATA_CLASSES, ChipStore, data_class, read_chip_index
from imagesim.synth import make_delivery

def jpg(a, **kw):
    out = io.BytesIO()
    Image.fromarray(np.clip(a,0,255).astype('u1')).save(out, 'JPEG', **{'quality':75, **kw})
    return out.getvalue()

def ground(seed=0, n=512):
    rng = np.random.default_rng(seed)
    y,x = np.mgrid[:n,:n]
    return 90+20*np.sin(x/30)[...,None]*np.cos(y/41)[...,None]+rng.normal(0,9,(n,n,1))+[0.,8,-10]

def truth_of(folder):
    "What the masks say, by the chip index"
    out = {}
    for p in ChipStore(folder).indexes():
        ix = read_chip_index(p)
        out.update(zip(ix['chip'].tolist(), data_class(ix['valid']).tolist()))
    return out

@pytest.fixture(scope='module')
def synthetic(tmp_path_factory):
    "A delivery with lakes and a strip's edge, chipped with everything kept"
    root = tmp_path_factory.mktemp('synthetic')
    make_delivery(root, size=6, dates=2, seed=1)
    chip_ard(root/'ard', root/'chips/33', proc=1, keep_empty=True)
    return root, truth_of(root/'chips/33')

def test_agreement_on_the_synthetic_delivery(synthetic):
    root, truth = synthetic
    s = make_nodata_index(root/'n.json', root/'chips/33', proc=1)
    said = read_nodata_index(root/'n.json')
    assert s.exit_code==0 and said.keys()==truth.keys()
    assert sum(said[n]==truth[n] for n in truth)/len(truth)>=0.995
    assert {n for n,c in said.items() if c=='no data'}=={n for n,c in truth.items() if c=='no data'}
    assert not [n for n,c in truth.items() if c=='all data' and said[n]!=c], 'no lake, no shadow'

def test_agreement_on_real_ground(shared, tmp_path):
    chip_ard(shared/'banepa/ard', tmp_path/'chips/45', proc=1, keep_empty=True)
    truth = truth_of(tmp_path/'chips/45')
    make_nodata_index(tmp_path/'n.json', tmp_path/'chips/45', proc=1)
    said = read_nodata_index(tmp_path/'n.json')
    wrong = {n for n in truth if said[n]!=truth[n]}
    assert sum(c=='no data' for c in said.values())==998 and all(truth[n]=='no data' for n,c in said.items() if c=='no data')
    valid = {}
    for p in ChipStore(tmp_path/'chips/45').indexes():
        ix = read_chip_index(p)
        valid.update(zip(ix['chip'], ix['valid']))
    assert len(wrong)<=6 and all((1-valid[n])*512**2<=10 for n in wrong), 'only chips that lack ten pixels or fewer'

def test_by_the_masks_it_is_exact(synthetic):
    root, truth = synthetic
    s = make_nodata_index(root/'m.json', root/'chips/33', ard_path=root/'ard', proc=2)
    assert read_nodata_index(root/'m.json')==dict(sorted(truth.items())) and s.extra['by mask']==len(truth)
    assert chip_ard(root/'ard', root/'chips/33', proc=1, keep_empty=True, nodata_index=root/'c.json').skipped==2
    assert (root/'c.json').read_bytes()==(root/'m.json').read_bytes() # the same index, in passing

def test_a_tile_that_marks_nothing_goes_by_the_rule(tmp_path):
    from test_chip import cut, make_tile
    make_tile(tmp_path/'ard', mask=False, missing=cut(), SPARSE_OK=False)
    chip_ard(tmp_path/'ard', tmp_path/'c', proc=1)
    s = make_nodata_index(tmp_path/'n.json', tmp_path/'c', ard_path=tmp_path/'ard', proc=1)
    assert s.extra['by mask']==0 and s.extra['partial data']==4 and s.extra['all data']==2

def test_same_input_same_bytes_whatever_the_way(synthetic):
    root, _ = synthetic
    for k,kw in enumerate((dict(proc=1), dict(proc=2), dict(proc=1, batch=7))): make_nodata_index(root/f'{k}.json', root/'chips/33', **kw)
    assert (root/'0.json').read_bytes()==(root/'1.json').read_bytes()==(root/'2.json').read_bytes()

def test_no_image_is_touched(synthetic):
    root, _ = synthetic
    before = {f.path:(f.size,f.modified) for f in list_files(root/'chips')}
    make_nodata_index(root/'x.json', root/'chips/33', proc=1)
    assert {f.path:(f.size,f.modified) for f in list_files(root/'chips')}==before

# --- the rule ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('quality', [30, 50, 75, 90, 95])
@pytest.mark.parametrize('subsampling', ['4:2:0', '4:4:4'])
def test_edges_from_every_side(quality, subsampling):
    "A straight edge at many angles and distances, as long as it takes a whole block"
    y,x = np.mgrid[:512,:512]-255.5
    for k,angle in enumerate(np.linspace(0, 2*np.pi, 13)[:-1]+0.1):
        reach = abs(255.5*np.cos(angle))+abs(255.5*np.sin(angle))
        for d in (reach-60, 100, -100):
            a = ground(k)
            gone = x*np.cos(angle)+y*np.sin(angle)>d
            a[gone] = 0
            data = jpg(a, quality=quality, subsampling=subsampling)
            assert chip_class(data)=='partial data', (angle, d)
            assert (missing_blocks(data) <= gone.reshape(64,8,64,8).any(axis=(1,3))).all(), 'only where something is missing'

@pytest.mark.parametrize('depth', [0.5, 1, 1.5, 2, 3, 5, 8])
@pytest.mark.parametrize('quality', [75, 90])
def test_dark_water_is_ground(depth, quality):
    y,x = np.mgrid[:512,:512]
    for seed,inside in enumerate(((x<300)&(y<400), (x-256)**2+(y-256)**2<180**2, x+y<1100)):
        a, rng = ground(seed), np.random.default_rng(seed)
        a[inside] = (depth+rng.normal(0,1.2,(512,512,1))+[-.5,0,.8])[inside]
        assert chip_class(jpg(a, quality=quality))=='all data'

def test_shadows_are_ground():
    "Black to the last bit, but small, and away from the corners"
    a = ground()
    for r,c in ((100,100), (200,300), (410,64)): a[r:r+48,c:c+40] = 0
    assert chip_class(jpg(a))=='all data'

def test_holes_and_single_pixels():
    a = ground()
    a[200:300,200:280] = 0
    assert chip_class(jpg(a))=='partial data' # a hole that somebody cut out
    a = np.zeros((512,512,3))
    a[300:303,77:79] = 120
    assert chip_class(jpg(a))=='partial data', 'six pixels were seen'
    assert chip_class(jpg(np.zeros((512,512,3))))==chip_class(jpg(np.zeros((128,128))))=='no data'

def test_grey_and_small_chips():
    for n in (128, 256, 1024):
        a = ground(n=n)
        assert chip_class(jpg(a))=='all data' and chip_class(jpg(a.mean(axis=2)))=='all data'
        a[:, n//2:] = 0
        assert chip_class(jpg(a))=='partial data' and chip_class(jpg(a.mean(axis=2)))=='partial data'

def test_black_level_is_exact():
    for q in range(1, 101):
        data = jpg(np.zeros((16,16)), quality=q)
        assert set(block_means(data).ravel())=={black_level(Image.open(io.BytesIO(data)).quantization[0][0])}

# --- files ------------------------------------------------------------------------------------------------------------------------

CHIPS = [f'Z33-0313110231200000{i}_A.jpg' for i in range(4)]

def folder(tmp_path):
    d = tmp_path/'chips/33'
    d.mkdir(parents=True)
    gone = ground(); gone[:,300:] = 0
    for n,a in zip(CHIPS, (ground(), gone, np.zeros((512,512,3)), ground(3))): (d/n).write_bytes(jpg(a))
    return d

def test_unreadable_files_are_named_and_left_out(tmp_path):
    d = folder(tmp_path)
    whole = (d/CHIPS[0]).read_bytes()
    (d/'Z33-03131102312000010_A.jpg').write_bytes(whole[:len(whole)//2])
    (d/'Z33-03131102312000011_A.jpg').write_bytes(b'')
    (d/'Z33-03131102312000012_A.jpg').write_text('text')
    Image.new('RGB', (9,9)).save(d/'Z33-03131102312000013_A.jpg', 'PNG')
    (d/'holiday.jpg').write_bytes(whole)
    s = make_nodata_index(tmp_path/'n.json', d, proc=1)
    assert s.exit_code==1 and {Path(k).name for k,_ in s.failures}=={f'Z33-0313110231200001{i}_A.jpg' for i in range(4)}
    assert json.loads((tmp_path/'n.json').read_text())==dict(zip(CHIPS, ('all data','partial data','no data','all data')))

def test_update_looks_only_at_what_is_new(tmp_path, monkeypatch):
    from imagesim import nodata
    d = folder(tmp_path)
    go = lambda: make_nodata_index(tmp_path/'n.json', d, proc=1, update=True)
    looked, real = [], nodata.chip_class
    monkeypatch.setattr(nodata, 'chip_class', lambda data: (looked.append(1), real(data))[1])
    old = dict.fromkeys(CHIPS, 1e9)
    for n,t in old.items(): os.utime(d/n, (t,t))
    go(); assert len(looked)==4
    first = (tmp_path/'n.json').read_bytes()
    go(); assert len(looked)==4 and (tmp_path/'n.json').read_bytes()==first
    (d/'Z33-03131102312000020_A.jpg').write_bytes((d/CHIPS[2]).read_bytes())
    os.utime(d/CHIPS[0], (2e9,2e9)) # changed since
    (d/CHIPS[3]).unlink()
    s = go()
    assert len(looked)==6 and s.extra['as before']==2 and sorted(read_nodata_index(tmp_path/'n.json'))==sorted([*CHIPS[:3], 'Z33-03131102312000020_A.jpg'])
    fresh = make_nodata_index(tmp_path/'f.json', d, proc=1)
    assert (tmp_path/'f.json').read_bytes()==(tmp_path/'n.json').read_bytes() and fresh.exit_code==0

def test_what_can_not_work_stops(tmp_path):
    d = folder(tmp_path)
    (tmp_path/'empty').mkdir()
    with pytest.raises(InputError, match='no chip in it'): make_nodata_index(tmp_path/'n.json', tmp_path/'empty', proc=1)
    with pytest.raises(MissingError): make_nodata_index(tmp_path/'n.json', tmp_path/'nowhere', proc=1)
    (tmp_path/'n.json').write_text('{"a": ')
    with pytest.raises(CorruptError): make_nodata_index(tmp_path/'n.json', d, proc=1, update=True)
    (tmp_path/'n.json').write_text('{"a": "full"}')
    with pytest.raises(CorruptError, match='full'): read_nodata_index(tmp_path/'n.json')

def test_filter(tmp_path):
    d = folder(tmp_path)
    make_nodata_index(tmp_path/'n.json', d, proc=1)
    assert filter_chips(tmp_path/'n.json')==[CHIPS[0],CHIPS[3]] and filter_chips(tmp_path/'n.json', ('partial data','no data'))==CHIPS[1:3]
    with pytest.raises(InputError, match='there are'): filter_chips({}, 'empty')

def test_in_a_bucket(tmp_path, bucket):
    d = folder(tmp_path)
    sync(d, f'{bucket}/chips/33')
    s = make_nodata_index(f'{bucket}/nodata-index.json', f'{bucket}/chips/33', proc=1)
    make_nodata_index(tmp_path/'n.json', d, proc=1)
    assert s.exit_code==0 and read_nodata_index(f'{bucket}/nodata-index.json')==read_nodata_index(tmp_path/'n.json')
