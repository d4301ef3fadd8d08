"""Datasets: splits without leaks, funnels that add up, versions that stay as they are"""
import json, os, signal, subprocess, sys, time
from pathlib import Path

import numpy as np, orjson, pandas as pd, pyarrow as pa, pyarrow.parquet as pq, pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from imagesim.ard import Cell, _outline, serving_cells
from imagesim.dataset import FILES, Dataset, diff_datasets, invent_delivery, list_datasets, make_dataset, pull_dataset, push_dataset, show_dataset, verify_dataset
from imagesim.encoding import read_labels_table, to_sparse
from imagesim.infra import CorruptError, ImagesimError, InputError, MissingError, StorageError
from imagesim.read import INDEX_SCHEMA, ChipIndex, index_path, write_chip_index

ROOT = Path(__file__).resolve().parent.parent
quick = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], derandomize=True)

def same(a, b): pd.testing.assert_frame_equal(a.astype({c:'Int8' for c in a.columns[1:]}), b, check_dtype=False, check_column_type=False)

# ---------------------------------------------------------------- deliveries to try it on

CLASSES = dict(cropland=.5, forest=.3, houses=.2, railway=.03)

def cells(x=2080, y=1060, w=3, h=2, zone=33): return [Cell.from_xy(zone, x+i, y+j, 12) for i in range(w) for j in range(h)]

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('data')
    invent_delivery(root, cells(), classes=CLASSES, seed=3)
    return root

def make(root, name='a', out='datasets', **kw): return make_dataset(name, root/'chips', root/'labels', out=root/out, **kw)
def splits(d): return pq.read_table(d.file('splits.parquet')).to_pandas()

def delivery(root, places, dates=('2018-07-04','2020-01-01'), classes=('a','b'), seed=0):
    "Write the index and labels of single places, at random"
    rng, by_cell = np.random.default_rng(seed), {}
    for p in sorted(places): by_cell.setdefault(p[:16], []).append(p)
    for c,ps in by_cell.items():
        note = dict(schema='s', schema_hash='h', classes=list(classes), attribution='')
        cols = dict(place=ps, lon=np.zeros(len(ps)), lat=np.zeros(len(ps)))
        for k in classes: cols |= {k:np.zeros(len(ps),'f4'), f'{k}_state':pa.array(rng.integers(0,2,len(ps)).astype('i1')), f'{k}_newest':pa.nulls(len(ps), pa.timestamp('s'))}
        path = root/f'labels/s/z17/zone={c[1:3]}/{c[4:]}.parquet'
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(cols).replace_schema_metadata({'imagesim':orjson.dumps(note)}), path)
        for i,d in enumerate(dates):
            n = len(ps)
            t = pa.table(dict(chip=[f'{p}_CAT{i}.jpg' for p in ps], path=['x']*n, offset=[1]*n, length=[1]*n, valid=[1.]*n, clear=[None]*n, date=[pd.Timestamp(d).date()]*n, off_nadir=[10.]*n, view_azimuth=[0.]*n), schema=INDEX_SCHEMA)
            write_chip_index(index_path(root/'chips/index', Cell.parse(c), f'CAT{i}'), ChipIndex(t, dict(jpgs=False)))

# ---------------------------------------------------------------- leaks

def leaks(table:pd.DataFrame, block:int, gap:int=0)->list[str]:
    "Find what a split must not do; independent of how it was made"
    import shapely
    out, of = [], table.groupby('place').split.agg(set)
    out += [f'{p} is in {s}' for p,s in of.items() if len(s)>1]
    of = {p:min(s) for p,s in of.items()}
    at = {(c.zone,c.x,c.y):(p,s) for p,s in of.items() for c in [Cell.parse(p)]}
    steps = [(dx,dy) for dx in range(-max(gap,1), max(gap,1)+1) for dy in range(-max(gap,1), max(gap,1)+1)]
    for (z,x,y),(p,s) in at.items(): # neighbours in the same zone
        for dx,dy in steps:
            o,t = at.get((z,x+dx,y+dy), (p,s))
            if t!=s and (o[:4+block]==p[:4+block] or max(abs(dx),abs(dy))<=gap): out.append(f'{p} in {s}, its neighbour {o} in {t}')
    if len({p[:3] for p in of})>1: # ground of two zones
        at, (lon0,_) = list(of), Cell.parse(min(of)).lonlat
        shapes = shapely.transform(np.array([_outline(Cell.parse(p), 1) for p in at], dtype=object), lambda a: np.column_stack([(a[:,0]-lon0+180)%360, a[:,1]]))
        i,j = shapely.STRtree(shapes).query(shapes, predicate='intersects')
        for a,b in zip(i.tolist(), j.tolist()):
            if at[a][:3]<at[b][:3] and of[at[a]]!=of[at[b]] and shapely.intersection(shapes[a], shapes[b]).area>1e-5*shapes[a].area: out.append(f'{at[a]} and {at[b]} show the same ground')
    return out

def test_the_leak_test_itself():
    "It must be able to fail"
    a, b = Cell.parse('Z33-03131102312000000'), Cell.parse('Z33-03131102312000001')
    t = pd.DataFrame(dict(place=[a.id,b.id], split=['train','test']))
    assert len(leaks(t, 14))==2 and not leaks(t.assign(split='test'), 14)
    assert leaks(t.iloc[[0,0]].assign(split=['train','test']), 14)==[f"{a.id} is in {set(['train','test'])}"]
    c, d = Cell.at(18, 46, 17, zone=33), Cell.at(18, 46, 17, zone=34)
    assert 'same ground' in leaks(pd.DataFrame(dict(place=[c.id,d.id], split=['train','test'])), 14)[0]
    e = [Cell.from_xy(33, 64*1000+63, 7, 17).id, Cell.from_xy(33, 64*1000+64, 7, 17).id] # across a border of blocks
    t = pd.DataFrame(dict(place=e, split=['train','test']))
    assert not leaks(t, 14) and len(leaks(t, 14, gap=1))==2

def test_no_leak(data):
    d = make(data, 'leak')
    assert not leaks(splits(d), d.manifest['block_level'])
    g = make(data, 'leak', gap=2)
    assert not leaks(splits(g), g.manifest['block_level'], gap=2) and leaks(splits(d), d.manifest['block_level'], gap=1), 'without a gap there are neighbours'

spots = [(18., 46.3, 33), (18., -21.2, 33), (180., -17., 60), (0., .02, 30), (-72., 64.9, 18), (18., 0., 33), (12., -55., 32)]

@settings(max_examples=12, **quick)
@given(spot=st.sampled_from(spots), shift=st.tuples(st.integers(-20,20), st.integers(-20,20)), size=st.integers(5,10), level=st.sampled_from([None,15,14]), gap=st.integers(0,2),
       both=st.booleans(), holes=st.sampled_from([0.,.3]), seed=st.integers(0,99))
def test_the_splitter_never_leaks(tmp_path_factory, spot, shift, size, level, gap, both, holes, seed):
    lon, lat, zone = spot
    root, rng, places = tmp_path_factory.mktemp('p'), np.random.default_rng(seed), set()
    for z in [zone, zone%60+1] if both else [zone]:
        m = Cell.at(min(lon,179.9999), lat, 17, zone=z)
        places |= {Cell.from_xy(z, m.x+shift[0]+i, m.y+shift[1]+j, 17).id for i in range(-size,size) for j in range(-size,size) if rng.random()>=holes}
    delivery(root, places, seed=seed)
    try: d = make_dataset('p', root/'chips', root/'labels', out=root/'d', block_level=level, gap=gap, seed=seed, split=dict(train=.6, val=.2, test=.2))
    except InputError as e:
        assert 'can not make 3 splits' in str(e) or 'no chip is left' in str(e)
        return
    t = splits(d)
    assert not leaks(t, d.manifest['block_level'], gap)
    assert (t.groupby('place').Feature.count()==2).all() and (t.groupby('block').split.nunique()==1).all()
    assert d.funnel.chips[:-1].sum()==len(d)==len(t) and d.funnel.chips[0]==2*len(places)
    left = serving_cells(sorted(places))
    assert {c.id for c in left}>=set(t.place) and (set(t.place)=={c.id for c in left} or gap or both), 'nothing else is lost'

def test_classes_are_spread_evenly(data):
    d = make(data, 'even', newer='keep')
    c = d.counts
    for k in ('cropland','forest','houses'):
        assert (c[k]>0).all() and np.abs(c[k]/c.chips-c[k].sum()/c.chips.sum()).max()<.5*c[k].sum()/c.chips.sum()
    assert np.abs(c.chips/c.chips.sum()-[.8,.1,.1]).max()<.04

def test_pinned_cells(data):
    pinned = {cells()[0].id:'test', cells()[5].parent(9).id:'train'}
    t = splits(make(data, 'pinned', pinned=pinned))
    assert set(t.split[t.place.str.startswith(cells()[0].id)])=={'test'}
    with pytest.raises(InputError, match='smaller than a block of level 12; pass block_level=13'): make(data, 'pinned', block_level=12, pinned={cells()[0].id+'0':'val'})

# ---------------------------------------------------------------- what is kept

def test_the_funnel_adds_up(data):
    "Against a count of our own, chip by chip"
    tiles = pd.DataFrame(dict(tile=[f'{c.id}_10300100A0000001' for c in cells()], sensor='WV02', cloud_share=[0,.1,.5,np.nan,0,0], off_nadir=5., date='2018-07-04'))
    d = make(data, 'funnel', tiles=tiles, max_cloud=.2, until='2019-12-31', max_empty=.05)
    ix = pd.concat([pq.read_table(p, columns=['chip','valid','date'], partitioning=None).to_pandas() for p in sorted((data/'chips/index').rglob('*.parquet'))])
    lab = pd.concat([pq.read_table(p, partitioning=None).to_pandas() for p in sorted((data/'labels').rglob('*.parquet'))]).set_index('place')
    got = dict(zip(d.funnel.step, d.funnel.chips))
    part = ix.valid<1
    cloud = ix.chip.str[:-4].map(lambda n: n[:16]+n[21:]).map(dict(zip(tiles.tile, tiles.cloud_share)))
    assert got['chips in the index']==len(ix) and got['seen to less than 1']==-part.sum()
    assert got['cloud of the tile unknown']==-(~part & cloud.isna()).sum() and got['tile with more than 0.2 cloud']==-(~part & (cloud>.2)).sum()
    keep = ix[~part & (cloud<=.2)]
    l = lab.loc[keep.chip.str[:21]]
    state = np.column_stack([np.where(l[f'{c}_newest'].dt.date.fillna(pd.Timestamp(0).date()).to_numpy()>keep.date.to_numpy(), np.nan, l[f'{c}_state'].astype(float)) for c in CLASSES])
    assert got['unmapped']==-np.isnan(state).all(1).sum()
    assert got['kept']==len(d)==len(pq.read_table(d.file('sparse.parquet'))) and d.funnel.chips[:-1].sum()==len(d)
    s = read_labels_table(d.file('sparse.parquet')).set_index('Feature')
    want = pd.DataFrame(state, index=keep.chip.to_numpy(), columns=list(CLASSES)).loc[s.index]
    assert (s.fillna(-1).to_numpy(int)==want.fillna(-1).to_numpy(int)).all(), 'labels as they were, but for features that are newer'
    assert (s==1).any(axis=1).mean()>=.95, 'not too many empty ones'

def test_newer_features_are_unmapped(data):
    d, k = make(data, 'newer'), make(data, 'newer', newer='keep')
    diff = diff_datasets(d, k)
    assert diff.labels.present.sum()>0 and diff.labels.absent.sum()==diff.labels.unmapped.sum()==0 and diff.removed==0

def test_limits(data, tmp_path):
    base = make(data, 'limits')
    day = make(data, 'limits', since='2020-01-01')
    assert set(splits(day).catalog_id)=={'10400100B0000002'} and set(splits(day).season)=={'winter'}
    assert splits(make(data, 'limits', catalog_ids='10300100A0000001')).date.nunique()==1
    two = [c.id for c in cells()[:2]]
    assert set(splits(make(data, 'limits', area=two)).place.str[:16])==set(two)
    c = cells()[3]
    lon, lat = c.lonlat
    box = dict(type='Polygon', coordinates=[[[lon-.02,lat-.01],[lon+.02,lat-.01],[lon+.02,lat+.01],[lon-.02,lat+.01],[lon-.02,lat-.01]]])
    inside = {p for p in splits(base).place if abs(Cell.parse(p).lonlat[0]-lon)<=.02 and abs(Cell.parse(p).lonlat[1]-lat)<=.01}
    assert set(splits(make(data, 'limits', area=box, block_level=15)).place)==inside and len(inside)>50
    with pytest.raises(InputError, match='no chip is left'): make(data, 'limits', sensors=['WV09'])
    with pytest.raises(InputError, match='no chip is left'): make(data, 'limits', min_clear=.5)
    seen = splits(make(data, 'limits', min_valid=.4))
    assert len(seen)>len(base) and seen.valid.min()>=np.float32(.4)

@pytest.mark.parametrize('wish', [dict(split=dict(train=.8)), dict(split=dict(train=.9,test=.2)), dict(min_valid=2), dict(since='2020-13-01'), dict(since='2021-01-01',until='2020-01-01'), dict(gap=-1),
    dict(gap=1.5), dict(block_level=40), dict(newer='drop'), dict(caps={'klass':{}}), dict(caps={'class':{'forest':1.5}}), dict(caps={'season':{'monsoon':1}}), dict(weights={'class':'even'}), dict(seed='a'),
    dict(area=[]), dict(area='POINT (1 2)'), dict(pinned={cells()[0].id:'tset'}), dict(quotas={'class':{'forest':.5}}), dict(caps={'sensor':{'WV77':5}}), dict(catalog_ids=[]), dict(split={'../x':1.}),
    dict(since=20180101), dict(pinned='x'), dict(caps=[1]), dict(weights='balanced'), dict(level='17'), dict(level=5), dict(split=dict(train=1-1e-10, val=1e-10)), dict(catalog_ids=5), dict(sensors=[5]),
    dict(caps={'sensor':{5:1}}), dict(undated='yes'), dict(credits=5), dict(chips=5), dict(pinned={cells()[0].id:[1]})])
def test_wrong_wishes_stop_before_anything_is_made(data, tmp_path, wish):
    with pytest.raises(InputError): make_dataset('wrong', **dict(chips=data/'chips', labels=data/'labels', out=tmp_path/'d') | wish)
    assert not list((tmp_path/'d').rglob('*.json')) and not (tmp_path/'d/wrong').exists()

def test_caps_quotas_weights(data):
    base = make(data, 'caps')
    n = base.counts.sum()
    wish = dict(caps={'class':dict(cropland=700, houses=.1), 'season':dict(winter=1500)}, quotas={'class':dict(railway=int(n.railway*.6))}, max_empty=.05, newer='unmapped')
    d = make(data, 'caps', **wish, weights={'class':'balanced','season':'balanced'})
    c, t = d.counts.sum(), splits(d)
    assert c.cropland<=700 and c.houses<=.1*c.chips and (t.season=='winter').sum()<=1500 and c['empty']<=.05*c.chips and c.railway>=int(n.railway*.6)
    assert c.houses>=.1*c.chips-1 or c.cropland in (699,700), 'and no more is taken than is needed'
    assert abs(t.weight[t.split=='train'].mean()-1)<1e-3 and t.weight.min()>0
    s = read_labels_table(d.file('sparse.parquet'))
    rare, common = t.weight[(s.railway==1).fillna(False).to_numpy(bool)].mean(), t.weight[(s.cropland==1).fillna(False).to_numpy(bool)].mean()
    assert rare>2*common
    with pytest.raises(InputError, match="class 'railway': .* the quota is 999,999"): make(data, 'caps', quotas={'class':dict(railway=999_999)})
    most = make(data, 'caps', caps={'class':dict(cropland=0)})
    assert most.counts.cropland.sum()==0

def test_unmapped_share(data):
    d = make(data, 'grey', max_unmapped=.02)
    c = d.counts.sum()
    assert 0<c.unmapped<=.02*c.chips

# ---------------------------------------------------------------- versions

def test_same_inputs_same_version(data, tmp_path):
    "In another folder, by another process, from files that were written anew"
    import shutil
    d = make(data, 'same')
    for f in data.rglob('*.parquet'):
        if 'datasets' in f.parts: continue
        new = tmp_path/'else where'/f.relative_to(data)
        new.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pq.read_table(f, partitioning=None), new, compression='gzip') # other bytes
    code = f"from imagesim.dataset import make_dataset; d = make_dataset('other', 'chips', 'labels', out='d', threads=1, caps={{}}, split=dict(train=.8, val=.1, test=.1)); print(d.version, d.is_new)"
    run = subprocess.run([sys.executable, '-c', code], cwd=tmp_path/'else where', env={**os.environ, 'PYTHONPATH':str(ROOT), 'TZ':'Asia/Tokyo'}, capture_output=True, text=True, timeout=120)
    assert run.stdout.split()==[d.version, 'True'], run.stderr
    o = Dataset(tmp_path/'else where/d/other'/d.version)
    for f in FILES: assert Path(o.file(f)).read_bytes()==Path(d.file(f)).read_bytes(), f
    text = (Path(o.path)/'manifest.json').read_text()
    assert str(tmp_path) not in text and 'else where' not in text, 'no paths'
    again = make(data, 'same')
    assert not again.is_new and again.version==d.version and len(list((data/'datasets/same').iterdir()))==1
    assert make(data, 'same', seed=1).version!=d.version

def test_a_change_of_the_inputs_is_another_version(data, tmp_path):
    import shutil
    for k in ('chips','labels'): shutil.copytree(data/k, tmp_path/k)
    a = make(tmp_path)
    f = next((tmp_path/'labels').rglob('*.parquet'))
    t = pq.read_table(f, partitioning=None)
    i = t.column_names.index('forest_state')
    pq.write_table(t.set_column(i, 'forest_state', pa.array([1]*len(t), pa.int8())), f)
    b = make(tmp_path)
    assert a.version!=b.version and diff_datasets(a, b).labels.loc['forest'].sum()>0 and len(list_datasets(tmp_path/'datasets'))==2
    assert show_dataset('a', a.version[:8], tmp_path/'datasets').version==a.version

def test_sorted_and_plain(data):
    d = make(data, 'plain')
    t = pq.read_table(d.file('sparse.parquet'))
    assert t.column_names==['Feature', *CLASSES] and t['Feature'].to_pylist()==sorted(t['Feature'].to_pylist())==pq.read_table(d.file('splits.parquet'))['Feature'].to_pylist()
    assert {str(o) for o in t.schema.types[1:]}=={'int8'}
    assert pd.read_csv(d.file('sparse.csv')).shape==(len(t), 5)
    same(read_labels_table(d.file('sparse.csv')), read_labels_table(d.file('sparse.parquet')))
    dense = read_labels_table(d.file('dense.parquet'))
    same(to_sparse(dense), read_labels_table(d.file('sparse.parquet')))

def test_killed_runs_leave_nothing(data, tmp_path):
    "kill -9 at several moments; what is there afterwards is whole, and the next run makes the version"
    code = f"import sys; from imagesim.dataset import make_dataset; print('go', flush=True); make_dataset('k', {str(data/'chips')!r}, {str(data/'labels')!r}, out={str(tmp_path)!r})"
    seen = []
    for wait in (0., .2):
        p = subprocess.Popen([sys.executable, '-c', code], env={**os.environ, 'PYTHONPATH':str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        p.stdout.readline()
        end = time.monotonic()+30
        while not list((tmp_path/'k').glob('.making-*/.duck-*')) and p.poll() is None and time.monotonic()<end: time.sleep(.002)
        time.sleep(wait)
        p.kill(); p.wait()
        seen.append(len(list((tmp_path/'k').glob('.making-*'))))
        assert all(Dataset(v).version==v.name for v in (tmp_path/'k').iterdir() if not v.name.startswith('.'))
        assert seen[-1]<=1, 'the next run removes what the last one left'
        if not seen[-1]: break # it was done
    assert seen[0]==1, 'it was killed in the middle'
    d = make_dataset('k', data/'chips', data/'labels', out=tmp_path)
    assert verify_dataset(d).ok and [v.name for v in (tmp_path/'k').iterdir()]==[d.version] and len(list_datasets(tmp_path))==1

def test_tampering_is_found(data, tmp_path):
    import shutil
    d = make(data, 'tamper')
    def copy(name):
        shutil.copytree(d.path, tmp_path/name/'tamper'/d.version)
        return tmp_path/name/'tamper'/d.version
    assert verify_dataset(d, data/'chips').ok
    v = copy('a'); b = bytearray((v/'dense.parquet').read_bytes()); b[100] ^= 1; (v/'dense.parquet').write_bytes(b)
    assert verify_dataset(str(v)).problems==['dense.parquet: its content has changed']
    v = copy('b'); (v/'splits.parquet').unlink(); (v/'extra.txt').write_text('x')
    assert verify_dataset(str(v)).problems==['splits.parquet: missing', 'extra.txt: does not belong here']
    v = copy('c'); m = json.loads((v/'manifest.json').read_text()); m['counts']['train']['chips'] += 1; (v/'manifest.json').write_text(json.dumps(m))
    with pytest.raises(CorruptError, match='seal'): verify_dataset(str(v))
    assert list_datasets(tmp_path/'c').state[0].startswith('damaged') and list_datasets(tmp_path/'c').chips.isna().all()
    v = copy('d'); (v/'manifest.json').write_text('{"form":1')
    with pytest.raises(CorruptError, match='not valid JSON'): Dataset(v)
    v = copy('e'); v.rename(v.parent/'0000000000000000')
    assert 'the folder is called' in verify_dataset(str(v.parent/'0000000000000000')).problems[0]
    v = copy('f') # everything made to fit again, but the name
    (v/'sparse.csv').write_text((v/'sparse.csv').read_text().replace(',1,', ',0,'))
    m = json.loads((v/'manifest.json').read_text())
    from imagesim.dataset import _seal, _sha256
    m['files']['sparse.csv'] = dict(size=os.path.getsize(v/'sparse.csv'), sha256=_sha256(str(v/'sparse.csv')))
    (v/'manifest.json').write_text(json.dumps(m | dict(seal=_seal(m))))
    assert verify_dataset(str(v)).problems==['the tables are not those that the version was named after']

def test_a_damaged_version_is_not_taken_for_made(data, tmp_path):
    d = make_dataset('x', data/'chips', data/'labels', out=tmp_path)
    (Path(d.path)/'manifest.json').write_text('{}')
    with pytest.raises(CorruptError, match='not the manifest'): make_dataset('x', data/'chips', data/'labels', out=tmp_path)

# ---------------------------------------------------------------- broken inputs

def copied(data, tmp_path):
    import shutil
    for k in ('chips','labels'): shutil.copytree(data/k, tmp_path/k)
    return tmp_path

def test_a_label_file_that_is_missing(data, tmp_path):
    root = copied(data, tmp_path)
    c = cells()[0]
    (root/f'labels/invented/z17/zone=33/{c.quadkey}.parquet').unlink()
    d = make(root)
    seen = sum((pq.read_table(p, partitioning=None)['valid'].to_numpy()>=1).sum() for p in (root/'chips/index/z17/zone=33').glob(f'{c.quadkey}_*'))
    assert dict(zip(d.funnel.step, d.funnel.chips))['no labels']==-seen and not splits(d).place.str.startswith(c.id).any()

def test_files_that_can_not_be_read(data, tmp_path):
    root = copied(data, tmp_path)
    (root/f'labels/invented/z17/zone=33/{cells()[1].quadkey}.parquet').write_bytes(b'PAR1 broken')
    (root/f'chips/index/z17/zone=33/{cells()[2].quadkey}_10300100A0000001.parquet').write_bytes(b'')
    (root/'chips/index/z17/zone=33/readme.parquet').write_bytes(b'')
    d = make(root)
    assert [p for p,_ in d.manifest['problems']]==['readme.parquet', f'chip index zone=33/{cells()[2].quadkey}_10300100A0000001.parquet', f'labels zone=33/{cells()[1].quadkey}.parquet']
    assert 'problem: ' in repr(d) and len(d)>0
    f = root/f'labels/invented/z17/zone=33/{cells()[3].quadkey}.parquet' # good to look at, broken inside
    b = bytearray(f.read_bytes()); b[200:2000] = os.urandom(1800); f.write_bytes(b)
    with pytest.raises(CorruptError): make(root)

def test_labels_of_two_schemas(data, tmp_path):
    root = copied(data, tmp_path)
    f = root/f'labels/invented/z17/zone=33/{cells()[1].quadkey}.parquet'
    t = pq.read_table(f, partitioning=None)
    m = json.loads(t.schema.metadata[b'imagesim'])
    pq.write_table(t.replace_schema_metadata({'imagesim':json.dumps(m | dict(schema_hash='other'))}), f)
    with pytest.raises(InputError, match=f"labels of .* are of schema 'invented'"): make(root)
    pq.write_table(t.drop(['forest_state']), f)
    d = make(root)
    assert 'forest' in d.manifest['problems'][0][1]
    pq.write_table(t.set_column(t.column_names.index('forest_state'), 'forest_state', pa.array([5]*len(t), pa.int8())), f)
    with pytest.raises(CorruptError, match='state of Z33-.* is 5'): make(root)

def test_nothing_there(data, tmp_path):
    with pytest.raises(MissingError, match='no chip index of level 17'): make_dataset('a', tmp_path, data/'labels', out=tmp_path)
    with pytest.raises(MissingError, match='no labels of'): make_dataset('a', data/'chips', tmp_path, out=tmp_path)
    with pytest.raises(MissingError, match='pass schema=, one of invented'): make_dataset('a', data/'chips', data/'labels', schema='land13', out=tmp_path)
    for bad in ('../x', 'a/b', '', '.x', 'a b', '/etc', 'ü', 5): 
        with pytest.raises(InputError): make_dataset(bad, data/'chips', data/'labels', out=tmp_path/'d')
    assert not (tmp_path/'d').exists()
    with pytest.raises(MissingError): show_dataset('none', out=tmp_path)
    assert len(list_datasets(tmp_path/'nowhere'))==0

def test_chips_that_have_gone(data, tmp_path):
    root = copied(data, tmp_path)
    d = make(root)
    f = sorted((root/'chips/index/z17/zone=33').glob('*.parquet'))[0]
    gone = set(pq.read_table(f, partitioning=None)['chip'].to_pylist()) & set(splits(d).Feature)
    f.unlink()
    c = verify_dataset(d, root/'chips')
    assert not c.ok and not c.problems and c.gone==len(gone) and set(c.examples)<=gone and 'have gone' in repr(c) and c.exit_code==1
    assert verify_dataset(d).ok

def test_chips_by_name_only(data, tmp_path):
    "A no-data index, or a list, where there is no chip index"
    from imagesim.read import write_nodata_index
    base = make(data, 'names')
    t = splits(base)
    with pytest.raises(InputError, match='no chip is left'): make_dataset('n', t.Feature.tolist(), data/'labels', out=tmp_path)
    d = make_dataset('n', t.Feature.tolist(), data/'labels', out=tmp_path, undated=True, newer='keep')
    assert set(splits(d).Feature)<=set(t.Feature) and len(d)==len(base)
    write_nodata_index(tmp_path/'nodata-index.json', {**dict.fromkeys(t.Feature[10:], 'all data'), t.Feature[0]:'partial data', t.Feature[1]:'no data'})
    e = make_dataset('n', tmp_path/'nodata-index.json', data/'labels', out=tmp_path, undated=True, newer='keep')
    assert len(e)==len(t)-10
    with pytest.raises(InputError, match='not the name of a chip'): make_dataset('n', ['holiday.jpg'], data/'labels', out=tmp_path)

def test_names_listed_twice(data, tmp_path):
    root = copied(data, tmp_path)
    a = make(root)
    f = sorted((root/'chips/index/z17/zone=33').glob('*.parquet'))[0]
    f.with_name(f.name.replace('.parquet', 'B.parquet')).write_bytes(f.read_bytes())
    b = make(root)
    assert len(a)==len(b) and dict(zip(b.funnel.step, b.funnel.chips))['listed twice']==-1024

# ---------------------------------------------------------------- the bucket

def test_push_and_pull(data, tmp_path, bucket):
    d = make(data, 'bucket')
    where = push_dataset(d, f'{bucket}/datasets')
    assert push_dataset(d, f'{bucket}/datasets')==where, 'again is no harm'
    assert list_datasets(f'{bucket}/datasets').version.tolist()==[d.version] and verify_dataset(where).ok
    got = pull_dataset('bucket', source=f'{bucket}/datasets', out=tmp_path/'d')
    for f in (*FILES, 'manifest.json'): assert (Path(got.path)/f).read_bytes()==(Path(d.path)/f).read_bytes()
    assert pull_dataset('bucket', d.version[:5], f'{bucket}/datasets', tmp_path/'d').path==got.path
    from imagesim.infra import write_bytes
    write_bytes(f'{where}/dense.parquet', b'something else')
    with pytest.raises(CorruptError, match='dense.parquet'): pull_dataset('bucket', source=f'{bucket}/datasets', out=tmp_path/'e')
    assert not list((tmp_path/'e').rglob('*.parquet'))
    os.unlink(Path(got.path)/'sparse.csv')
    with pytest.raises(CorruptError, match='sparse.csv: missing'): push_dataset(got, f'{bucket}/other')
    with pytest.raises(MissingError): pull_dataset('nothing', source=f'{bucket}/datasets', out=tmp_path/'f')

def test_made_in_the_bucket(data, tmp_path, bucket):
    from imagesim.infra import sync
    local = make(data, 'remote')
    for k in ('chips','labels'): sync(data/k, f'{bucket}/{k}')
    d = make_dataset('remote', f'{bucket}/chips', f'{bucket}/labels', out=f'{bucket}/datasets')
    assert d.version==local.version and d.is_new and verify_dataset(d).ok
    assert not make_dataset('remote', f'{bucket}/chips', f'{bucket}/labels', out=f'{bucket}/datasets').is_new
    assert len(d.blocks())==local.counts.blocks.sum()

# ---------------------------------------------------------------- hostile inputs

def resealed(folder, **changes):
    "Change a manifest, and seal it again, with the hashes of what is there now"
    from imagesim.dataset import _seal, _sha256
    p = Path(folder)/'manifest.json'
    m = json.loads(p.read_text())
    m['files'] = {f:dict(size=os.path.getsize(p.parent/f), sha256=_sha256(str(p.parent/f))) for f in FILES if (p.parent/f).exists()}
    for k,v in changes.items():
        if v is ...: m.pop(k)
        else: m[k] = v(m[k]) if callable(v) else v
    p.write_text(json.dumps(m | dict(seal=_seal(m))))

@pytest.fixture
def copies(data, tmp_path):
    "Makes copies of a version, each in a folder of its own"
    import shutil
    d = make(data, 'tamper')
    def copy(i, name='tamper'): return Path(shutil.copytree(d.path, tmp_path/str(i)/name/d.version))
    return copy

def test_a_chip_listed_twice_is_not_nothing(data):
    "Two pairs of equal rows must not cancel out"
    t = splits(make(data, 'names')).Feature.tolist()
    made = [make_dataset('twice', t[:1500]+[t[i]]*2, data/'labels', out=data/'datasets', undated=True, newer='keep', split=dict(train=.6, test=.4)) for i in (1500,1501)]
    assert made[0].version!=made[1].version and made[1].is_new

def edit_parquet(path, column, values):
    t = pq.read_table(path)
    pq.write_table(t.set_column(t.column_names.index(column), t.schema.field(column), pa.array(values(t[column].to_pylist()), t.schema.field(column).type)), path)

def test_tampering_that_fits_together(copies, tmp_path):
    "Hashes and seal are made to fit; pull and verify find it all the same"
    def counted(m): m['train']['chips'] += 1; return m
    flip = lambda v: [1-o if o is not None else o for o in v]
    edits = dict(
        sparse=(lambda v: edit_parquet(v/'sparse.parquet', 'forest', flip), {}, 'sparse.parquet does not say the same'),
        dense=(lambda v: edit_parquet(v/'dense.parquet', 'present', lambda p: [['forest']]*len(p)), {}, 'dense.parquet does not say the same'),
        csv=(lambda v: (v/'sparse.csv').write_text((v/'sparse.csv').read_text().replace(',1,', ',0,')), {}, 'not those that the version was named after'),
        season=(lambda v: edit_parquet(v/'splits.parquet', 'season', lambda p: ['spring']*len(p)), {}, 'not those that the version was named after'),
        valid=(lambda v: edit_parquet(v/'splits.parquet', 'valid', lambda p: [.5]*len(p)), {}, 'not those that the version was named after'),
        counts=(None, dict(counts=counted), 'counts in the manifest'), wishes=(None, dict(query=lambda q: q | dict(seed=5)), 'inputs or the wishes'),
        credits=(None, dict(credits=['nobody']), 'inputs or the wishes'), sources=(None, dict(sources=lambda s: s | dict(chips={})), 'inputs or the wishes'),
        schema=(lambda v: (v/'schema.toml').write_text('name = "x"\nhash = "y"\n[[class]]\nname = "a"\n'), {}, 'schema.toml is not'))
    for k,(edit,changes,what) in edits.items():
        v = copies(k)
        if edit: edit(v)
        resealed(v, **changes)
        assert any(what in p for p in verify_dataset(str(v)).problems), (k, verify_dataset(str(v)))
        with pytest.raises(CorruptError, match=what): pull_dataset('tamper', source=tmp_path/k, out=tmp_path/f'{k}-pulled')
        assert not list((tmp_path/f'{k}-pulled').rglob('*.parquet'))
    v = copies('other', 'another')
    with pytest.raises(CorruptError, match='another was asked for'): pull_dataset('another', source=tmp_path/'other', out=tmp_path/'other-pulled')

bad = dict(version=['../../x','a/b','','lock',5,None,'a'*300,'x\0y'], made=[...,5], counts=[{},5], query=[{},5,...], files=[{},dict.fromkeys(FILES,'x')], inputs=[{},[]], code=[{},...], block_level=['12',...],
           funnel=[{'chips':'x'}], notes=[5,[5]], problems=[[5]], name=['../x',5], sources=[{}], colours=[[]])

def test_manifests_of_odd_form(copies, tmp_path):
    "Each is an error of ours, and the list of the others stands"
    cases = [(k,v) for k,vs in bad.items() for v in vs]
    version = copies('good').name
    for i,(k,v) in enumerate(cases):
        resealed(p := copies('all', f'c{i}'), **{k:v})
        with pytest.raises(CorruptError): Dataset(p)
        with pytest.raises(CorruptError): pull_dataset(f'c{i}', source=tmp_path/'all', out=tmp_path/'pulled')
    copies('all')
    resealed(copies('all', 'old'), form=1)
    t = list_datasets(tmp_path/'all').set_index('name')
    assert len(t)==len(cases)+2 and t.state['tamper']=='ok' and (t.state=='ok').sum()==1 and 'form 1' in t.state['old'] and t.version['tamper']==version

def test_an_edited_version_is_not_there_already(data, tmp_path):
    wish = dict(chips=data/'chips', labels=data/'labels', out=tmp_path)
    d = make_dataset('x', **wish)
    f = Path(d.path)/'sparse.csv'
    text = f.read_text()
    f.write_text(text.replace(',1', ',0'))
    with pytest.raises(CorruptError, match='sparse.csv: its content has changed; remove the folder'): make_dataset('x', **wish)
    f.write_text(text)
    credited = [make_dataset('x', **wish, credits=c) for c in ('Maxar', ['Maxar','A'], ['A','Maxar'])]
    assert [c.is_new for c in credited]==[True,True,False] and credited[1].manifest['credits']==['A','Maxar','invented'] and credited[0].version!=d.version
    (Path(d.path)/'manifest.json').unlink()
    with pytest.raises(CorruptError, match='without a manifest; remove the folder'): make_dataset('x', **wish)

def test_undated_chips_believe_no_dated_label(data, tmp_path):
    t = splits(make(data, 'names')).Feature.tolist()
    trust, doubt = (make_dataset('u', t, data/'labels', out=tmp_path, undated=True, newer=n, max_unmapped=.99) for n in ('keep','unmapped'))
    assert trust.counts.forest.sum()>0 and doubt.counts[list(CLASSES)].to_numpy().sum()==0
    with pytest.raises(InputError, match='undated=True'): make_dataset('u', t, data/'labels', out=tmp_path)

@pytest.mark.parametrize('note', ['[1]', '{', '{"schema":"invented"}', '{"schema":"invented","schema_hash":5,"classes":["forest"]}', '{"schema":"a","schema_hash":"b","classes":[5]}',
                                  '{"schema":"a","schema_hash":"b","classes":["chips"]}', '{"schema":"a","schema_hash":"b","classes":["forest"],"attribution":5}'])
def test_labels_that_say_odd_things_of_themselves(data, tmp_path, note):
    from imagesim.dataset import _find_inputs
    root = copied(data, tmp_path)
    f = root/f'labels/invented/z17/zone=33/{cells()[1].quadkey}.parquet'
    pq.write_table(pq.read_table(f, partitioning=None).replace_schema_metadata({'imagesim':note}), f)
    i = _find_inputs(root/'chips', root/'labels', None, None, 17, str(tmp_path))
    assert len(i.problems)==1 and 'not a label table' in i.problems[0][1] and len(i.labels)==len(cells())-1

def test_the_age_of_the_map(data, tmp_path):
    root = copied(data, tmp_path)
    for c,day in zip(cells(), ('2021-05-01T00:00:00Z','2020-03-04T05:06:07Z')):
        f = root/f'labels/invented/z17/zone=33/{c.quadkey}.parquet'
        t = pq.read_table(f, partitioning=None)
        pq.write_table(t.replace_schema_metadata({'imagesim':json.dumps(json.loads(t.schema.metadata[b'imagesim']) | dict(data_timestamp=day))}), f)
    assert 'OpenStreetMap as of 2020-03-04 to 2021-05-01, by cell; of 4 cells it is unknown' in make(root).manifest['notes']

def test_a_tile_table_that_knows_nothing(data):
    tiles = pd.DataFrame(dict(tile=['Z33-000000000000_X'], sensor='WV02', cloud_share=.1, off_nadir=5., date='2018-07-04'))
    assert any('knows no tile' in n for n in make(data, 'strange', tiles=tiles).manifest['notes'])
    for odd in (dict(date='soon'), dict(cloud_share='much')):
        with pytest.raises(InputError, match='no tile table'): make(data, 'strange', tiles=tiles.assign(**odd))

def test_two_at_once_and_nobody_s_folder_goes(data, tmp_path):
    from concurrent.futures import ThreadPoolExecutor
    from imagesim.dataset import _locked_folder
    def one(i):
        with _locked_folder(str(tmp_path/'n')) as p: return os.path.exists(f'{p}/lock')
    with ThreadPoolExecutor(8) as pool: assert all(pool.map(one, range(400)))
    assert not (tmp_path/'n').exists()

def test_a_folder_that_may_not_be_written(data, tmp_path, monkeypatch):
    "What is there is found; what is not is an error of ours"
    import imagesim.dataset as module
    d = make_dataset('r', data/'chips', data/'labels', out=tmp_path)
    def no(*a, **k): raise PermissionError('read-only')
    monkeypatch.setattr(module, '_new_folder', no) # root may write everywhere
    again = make_dataset('r', data/'chips', data/'labels', out=tmp_path)
    assert again.version==d.version and not again.is_new
    (tmp_path/'file').write_text('')
    monkeypatch.undo()
    with pytest.raises(StorageError): make_dataset('r', data/'chips', data/'labels', out=tmp_path/'file')

def test_level_18(data, tmp_path):
    with pytest.raises(MissingError, match='of level 17 only'): make_dataset('l', ['Z33-'+'0'*18+'_X.jpg'], data/'labels', out=tmp_path, level=18, undated=True)

@pytest.mark.parametrize('folder', ['q? st*r[1]', 'b\\s'])
def test_folders_with_odd_names(data, tmp_path, folder):
    root = tmp_path/folder
    root.mkdir()
    d = make(copied(data, root))
    assert d.version==make(data, 'odd').version and verify_dataset(d, root/'chips').ok
