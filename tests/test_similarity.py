"""The similarity schema: counts, generations, two writers, kill -9, damaged and hostile folders, buckets."""
import contextlib, datetime, errno, hashlib, os, re, resource, shutil, signal, subprocess, sys, time
from pathlib import Path

import numpy as np, orjson, pyarrow as pa, pyarrow.parquet as pq, pytest

from conftest import ROOT
import imagesim.similarity as sim
from imagesim.infra import CorruptError, ImagesimError, InputError, MissingError, StorageError, list_files, write_bytes
from imagesim.nearest import exact_search
from imagesim.similarity import (add_embeddings, build_schema, generations, list_schemas, make_embeddings, make_schema, open_schema, prune_collection, pull_schema, push_schema, read_generation, read_unit,
    remove_embeddings, show_schema, storing, unit_key, vector_array, verify_schema, writing)

def bundle_at(folder, hash='0'*64, dim=16, **more):
    folder.mkdir(parents=True)
    (folder/'weights.safetensors').write_bytes(os.urandom(500))
    (folder/'bundle.json').write_bytes(orjson.dumps(dict(name='invented', hash=hash, dim=dim, features=dim, classes=['a','b'])|more))
    return folder

@pytest.fixture
def made(tmp_path):
    "A schema of 3 cells x 2 dates x 36 chips, and the files it is made of"
    files = make_embeddings(tmp_path/'e', cells=3, side=6, dim=16, classes=['a','b'])
    s = build_schema('land', bundle_at(tmp_path/'b'), tmp_path/'e', root=tmp_path/'s')
    assert s.exit_code==0
    return tmp_path/'s/land', files

def change(src, dest, fn=None, meta=None, columns=None):
    "Copy a file of embeddings with something changed"
    t = pq.read_table(src)
    m = orjson.loads(t.schema.metadata[b'imagesim'])|(meta or {})
    v, chips = np.array(t['vector'].to_pylist(), 'f4'), t['chip'].to_pylist()
    if fn: chips, v = fn(chips, v)
    t = t.set_column(0, 'chip', pa.array(chips)).set_column(t.column_names.index('vector'), 'vector', vector_array(v))
    if columns: t = columns(t)
    dest.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(t.replace_schema_metadata({'imagesim':orjson.dumps(m)}), dest)
    return dest

def answers(path, n=20):
    c = open_schema(path).collection()
    return c.search(c.vectors(np.arange(min(n,len(c)))), 5), c.rows.to_pydict()

def test_what_is_served_is_what_was_given(made):
    path, files = made
    c = open_schema(path).collection()
    t = pa.concat_tables([pq.read_table(f) for f in files])
    assert sorted(t['chip'].to_pylist())==sorted(c.rows['chip'].to_pylist()) and len(c)==len(t)==216
    at = c.find(t['chip'].to_pylist())
    assert np.allclose(c.vectors(at), np.array(t['vector'].to_pylist()), atol=1e-3)
    for col in ('chip','place','cell','zone','catalog_id','date','valid','clear','off_nadir','lon','lat','geometry','probs'): assert c.rows[col].take(pa.array(at)).to_pylist()==t[col].to_pylist(), col
    s, r = c.search(c.vectors([4,100]), 7)
    assert np.array_equal(r, exact_search(c.vectors([4,100]), c.vectors(slice(None)), 7)[1])

def test_find(made):
    c = open_schema(made[0]).collection()
    names = c.rows['chip'].to_pylist()
    assert c.find(names).tolist()==list(range(216)) and c.find([names[3].removesuffix('.jpg')]).tolist()==[3] and c.find([]).tolist()==[]
    cell = names[0][:16]
    absent = [names[0].replace('_','3_'), 'Z33-00000000000000000_X.jpg', cell+'33333_'+names[0].split('_')[1], cell+'00000_'+names[0].split('_')[1][:-4]+'X']
    assert c.find(absent, strict=False).tolist()==[-1]*4
    for a in absent:
        with pytest.raises(MissingError): c.find(a)
    for odd in ('', 'x.jpg', '../../etc/passwd', 'Z33-0_X.jpg', None):
        with pytest.raises(InputError): c.find([odd])

def test_add_replace_remove_leave_the_rest_alone(made, tmp_path):
    path, files = made
    old = open_schema(path).collection()
    before = {f.path:(f.size,f.modified) for f in list_files(path/'collections/main/segments')}
    more = make_embeddings(tmp_path/'m', cells=4, side=6, dim=16, classes=['a','b'], seed=9)
    s = add_embeddings(path, [more[0], more[6], more[7]])
    c = open_schema(path).collection()
    assert (s.done, s.extra['generation'], len(c), c.generation) == (3, 2, 216+72, 2)
    assert {k:v for f in list_files(path/'collections/main/segments') if (k := f.path) in before for v in [(f.size,f.modified)]}==before
    chips = pq.read_table(more[0])
    assert np.allclose(c.vectors(c.find(chips['chip'].to_pylist())), np.array(chips['vector'].to_pylist()), atol=1e-3)
    assert len(set(c.rows['chip'].to_pylist()))==len(c)
    assert add_embeddings(path, [more[0], more[6]]).skipped==2 and open_schema(path).collection().generation==2
    assert len(old)==216 and np.isfinite(old.search(old.vectors([0]), 3)[0]).all() # who opened the former state keeps it
    gone = remove_embeddings(path, catalog_ids=files[1].stem.split('_',1)[1])
    c = open_schema(path).collection()
    assert len(gone)==1 and c.generation==3 and len(c)==216+72-36 and not any(k in c.units for k in gone)
    assert remove_embeddings(path, cells='Z33-1')!=[] and len(open_schema(path).collection())==0
    e = open_schema(path).collection()
    assert (e.search(np.ones(16), 3)[1]==-1).all() and verify_schema(path).failed==0

def test_refused_rows_are_named_and_counted(made, tmp_path):
    path, files = made
    def faults(c, v):
        c[3], c[5], c[8] = c[2], 'Z33-00000000000000000_X.jpg', '../../../etc/passwd'
        v[0,3], v[1], v[6] = np.nan, 0, np.inf
        v[4] *= 7
        return c, v
    s = add_embeddings(path, [change(files[0], tmp_path/'x.parquet', faults, dict(fingerprint='new'))])
    c = open_schema(path).collection()
    assert s.done==1 and s.extra['refused']==7 and len(c.refused())==7
    assert c.facts['counts']['given']==216==len(c)+7 and verify_schema(path).failed==0
    why = ' '.join(c.refused()['reason'])
    assert all(w in why for w in ('there twice', 'not a chip of this cell', 'NaN or infinite', 'length 0', 'length 7'))

@pytest.mark.parametrize('how,say', [
    (lambda f,d: d.write_bytes(f.read_bytes()[:-300]), 'not a readable Parquet'), (lambda f,d: d.write_bytes(b''), 'not a readable Parquet'), (lambda f,d: d.write_bytes(b'PAR1'*50), 'not a readable Parquet'),
    (lambda f,d: change(f, d, meta=dict(encoder_hash='f'*64)), 'another encoder'), (lambda f,d: change(f, d, meta=dict(dim=8)), 'vectors of 16'), (lambda f,d: change(f, d, lambda c,v: (c, v[:,:8]/np.linalg.norm(v[:,:8],axis=1,keepdims=True)), dict(dim=8)), 'vectors of 8'),
    (lambda f,d: pq.write_table(pq.read_table(f).replace_schema_metadata({}), d), 'metadata has no entry'), (lambda f,d: change(f, d, meta=dict(classes=['a'])), 'no column probs that fits'),
    (lambda f,d: change(f, d, meta=dict(classes=[]), columns=lambda t: t.drop_columns('probs')), 'other classes'), (lambda f,d: change(f, d, columns=lambda t: t.drop_columns('vector')), "no column 'vector'"),
    (lambda f,d: change(f, d, columns=lambda t: t.drop_columns('lon')), "no column 'lon'"), (lambda f,d: change(f, d, columns=lambda t: t.set_column(t.column_names.index('vector'), 'vector', pa.array([[1.]]*len(t)))), 'fixed size list'),
    (lambda f,d: change(f, d, columns=lambda t: t.slice(0,0)), 'holds no chips'), (lambda f,d: change(f, d, lambda c,v: (['x']*len(c), v)), 'holds no chips')])
def test_a_bad_file_is_one_line_and_the_rest_is_done(made, tmp_path, how, say):
    path, files = made
    bad, good = tmp_path/'bad.parquet', make_embeddings(tmp_path/'m', cells=4, side=6, dim=16, classes=['a','b'], seed=9)[7]
    src = change(files[0], tmp_path/'src.parquet', meta=dict(fingerprint='new'))
    how(src, bad)
    s = add_embeddings(path, [bad, good])
    assert (s.failed, s.done, s.exit_code)==(1, 1, 1) and say in s.failures[0][1] and '\n' not in s.failures[0][1]
    assert len(open_schema(path).collection())==216+36

def test_an_empty_cell_is_known(tmp_path):
    f = make_embeddings(tmp_path/'e', cells=1, dates=1, side=2, dim=16)[0]
    change(f, f, columns=lambda t: t.slice(0,0))
    s = build_schema('x', bundle_at(tmp_path/'b', classes=None), tmp_path/'e', root=tmp_path/'s')
    assert s.done==1 and s.extra['units']==1 and len(open_schema(tmp_path/'s/x').collection())==0

def test_nothing_to_do_and_nothing_there(tmp_path):
    b = bundle_at(tmp_path/'b')
    (tmp_path/'e').mkdir()
    with pytest.raises(InputError, match='no embeddings'): build_schema('x', b, tmp_path/'e', root=tmp_path/'s')
    with pytest.raises(MissingError): build_schema('x', b, tmp_path/'nowhere', root=tmp_path/'s')
    with pytest.raises(MissingError, match='has no collection'): open_schema(tmp_path/'s/x').collection()
    with pytest.raises(MissingError, match='no schema.json'): open_schema(tmp_path/'e')
    for name in ('../x', 'a/b', '', '.x', 'a..b', 'x'*65, None):
        with pytest.raises(InputError, match='is no name'): build_schema(name, b, tmp_path/'e', root=tmp_path/'s')
    with pytest.raises(InputError, match='the bar is'): build_schema('x', b, tmp_path/'e', root=tmp_path/'s', bar=95)

def test_another_encoder_under_the_same_name(made, tmp_path):
    with pytest.raises(InputError, match='another encoder'): make_schema('land', bundle_at(tmp_path/'b2', hash='1'*64), tmp_path/'s')
    assert make_schema('land', tmp_path/'b', tmp_path/'s').encoder_hash=='0'*64

def test_two_writers(made):
    path, files = made
    with writing(path/'collections/main'):
        with pytest.raises(StorageError, match='another process is changing it'): remove_embeddings(path, cells='Z33-1')
        with pytest.raises(StorageError, match='another process'): prune_collection(path/'collections/main')
    g = read_generation(path/'collections/main')
    with pytest.raises(StorageError, match='has written this generation'): sim._publish(str(path/'collections/main'), g)

def test_old_generations_go(made, tmp_path):
    path, files = made
    more = make_embeddings(tmp_path/'m', cells=8, dates=1, side=4, dim=16, classes=['a','b'], seed=9)
    for f in more[3:]: add_embeddings(path, [f])
    col = path/'collections/main'
    assert generations(col)==[5,6]
    assert prune_collection(col, keep=1)==['generations/00000005.json'] and generations(col)==[6]
    (col/'segments/.half').mkdir(); (col/'segments/sffffffffffffffff').mkdir()
    assert prune_collection(col)==['segments/.half', 'segments/sffffffffffffffff'] and verify_schema(path).failed==0

def test_small_segments_are_written_together(made, tmp_path, monkeypatch):
    path, files = made
    monkeypatch.setattr(sim, 'SMALL_SEGMENTS', 4)
    more = make_embeddings(tmp_path/'m', cells=8, dates=1, side=4, dim=16, classes=['a','b'], seed=9)
    counts = []
    for f in more[3:]:
        add_embeddings(path, [f])
        counts.append(len(read_generation(path/'collections/main')['segments']))
    c = open_schema(path).collection()
    assert max(counts)<4+1 and 1 in counts and len(c)==216+80 and c.find(c.rows['chip'].to_pylist()).tolist()==list(range(296)) and verify_schema(path).failed==0
    remove_embeddings(path, cells=[c.rows['cell'][0].as_py()])
    remove_embeddings(path, catalog_ids=[f.stem.split('_',1)[1] for f in files[2:5]])
    d = open_schema(path).collection()
    assert sum(len(s) for s in d.segments)<2*len(d) and verify_schema(path).failed==0

@pytest.fixture(scope='module')
def quick_made(tmp_path_factory):
    "Built once; read only"
    root = tmp_path_factory.mktemp('quick')
    make_embeddings(root/'e', cells=4, dates=1, side=32, dim=16, seed=2)
    build_schema('land', bundle_at(root/'b', classes=None), root/'e', root=root/'s', quick=True, bar=.9)
    return root

@pytest.fixture
def quick(quick_made, tmp_path):
    shutil.copytree(quick_made, tmp_path, dirs_exist_ok=True)
    return tmp_path/'s/land'

def test_a_quick_index_follows_what_is_added(quick, tmp_path):
    a = open_schema(quick).collection()
    assert a.index.serves and a.card['rows']==4096
    s = add_embeddings(quick, make_embeddings(tmp_path/'m', cells=6, dates=1, side=16, dim=16, seed=2)[4:])
    b = open_schema(quick).collection()
    assert b.facts['index']['name']==a.facts['index']['name'] and b.card['rows']==4096+512 and b.card['bar']==.9 and b.card['learned']=='on 4,096 rows'
    remove_embeddings(quick, cells=a.rows['cell'][0].as_py())
    c = open_schema(quick).collection()
    assert len(c)==4096+512-1024 and verify_schema(quick).failed==0
    q = c.vectors(np.arange(0, len(c), 9))
    got, want = (c.search(q, 10, exact=e)[1] for e in (False, True))
    assert np.mean([len(set(x)&set(y))/10 for x,y in zip(got,want)])>=.9
    assert np.array_equal(c.search(q, 1, exact=False)[1][:,0], np.arange(0, len(c), 9))

def test_the_bar_can_be_changed(quick, tmp_path):
    s = build_schema('land', tmp_path/'b', tmp_path/'e', root=tmp_path/'s', bar=.99999)
    c = open_schema(quick).collection()
    assert c.generation==2 and not c.index.serves and 'below the bar' in s.extra['search'] and 'exact' in show_schema(quick).loc['search','main']
    with pytest.raises(InputError, match='the bar is'): c.search(c.vectors([0]), 3, exact=False)
    assert build_schema('land', tmp_path/'b', tmp_path/'e', root=tmp_path/'s', quick=False).extra['search']=='exact'

def test_every_byte_counts(quick):
    "Whatever file is changed by one bit, verify names it"
    files = [f for f in list_files(quick)]
    rng = np.random.default_rng(0)
    kinds = {Path(f.path).name.split('-')[0]:f for f in files}
    assert len(kinds)>=10 and verify_schema(quick).failed==0
    for f in kinds.values():
        data = Path(f.path).read_bytes()
        for at in {0, len(data)-1, int(rng.integers(len(data)))}:
            bad = bytearray(data); bad[at] ^= 1
            Path(f.path).write_bytes(bad)
            named = [n for n,_ in verify_schema(quick).failures]
            rel = f.path[len(str(quick))+1:]
            assert any(rel in n or n in rel for n in named) or any(rel in why for _,why in verify_schema(quick).failures), (rel, at, named)
        Path(f.path).write_bytes(data[:-1] if len(data)>1 else b'')
        assert verify_schema(quick).failed
        Path(f.path).unlink()
        assert verify_schema(quick).failed
        Path(f.path).write_bytes(data)
    assert verify_schema(quick).failed==0

def resealed(path, change):
    "Change a JSON file as an attacker would: with the seal made anew"
    o = orjson.loads(path.read_bytes())
    change(o)
    path.write_bytes(sim._json_bytes(sim._sealed(o)))

@pytest.mark.parametrize('edit', [lambda g: g['segments'][0].update(name='../../../../etc'), lambda g: g['segments'][0].update(name='/etc'), lambda g: g['index'].update(name='../x'), lambda g: g['index']['files'].update({'../x':{}}),
    lambda g: g['segments'][0].update(rows=10**12), lambda g: g.update(dim=10**9), lambda g: g.update(segments='x'), lambda g: g['index'].update(lists=10**9), lambda g: g['counts'].update(rows=1), lambda g: g.update(classes=['q']),
    lambda g: g['segments'].append(g['segments'][0]), lambda g: g['segments'][0].update(drop=None), lambda g: g.update(number='../../x'), lambda g: g.update(number=10**9), lambda g: g.update(number=-5), lambda g: g.pop('number'),
    lambda g: g.update(counts={}), lambda g: g.update(zones=5), lambda g: g.update(dates=None), lambda g: g.update(credits='<b>'), lambda g: g.update(card={'serves':True}), lambda g: g['card'].update(recall='x'), lambda g: g.update(ancestors=[1])])
def test_hostile_generations(quick, edit):
    resealed(quick/'collections/main/generations/00000001.json', edit)
    with pytest.raises(ImagesimError): open_schema(quick).collection()
    with contextlib.suppress(ImagesimError): show_schema(quick)
    assert verify_schema(quick).failed and len(list_schemas(quick.parent))==1

@pytest.mark.parametrize('edit', [lambda s: s.update(name='../x'), lambda s: s['encoder']['files'].update({'../../x':dict(size=1, sha256='')}), lambda s: s.update(encoder=3), lambda s: s.update(form='?'), lambda s: s['encoder'].update(dim='x')])
def test_hostile_schemas(quick, tmp_path, edit):
    resealed(quick/'schema.json', edit)
    for fn in (lambda: open_schema(quick), lambda: pull_schema(quick, tmp_path/'away')):
        with pytest.raises(ImagesimError): fn()
    assert not (tmp_path/'away').exists() or not list_files(tmp_path/'away')

def test_one_damaged_schema_does_not_hide_the_others(made):
    path, files = made
    shutil.copytree(path, path.parent/'other')
    resealed(path/'collections/main/generations/00000001.json', lambda g: g.update(counts={}))
    t = list_schemas(path.parent).set_index('schema')
    assert t.loc['other','chips']==216 and t.loc['land','encoder'].startswith('unreadable')

def test_to_a_bucket_and_back(made, bucket, tmp_path):
    path, files = made
    with pytest.raises(MissingError): pull_schema(f'{bucket}/schemas/land', tmp_path/'far')
    p = push_schema(path, f'{bucket}/schemas')
    assert p.failed==0 and list_schemas(f'{bucket}/schemas')['chips'].tolist()==[216]
    assert pull_schema(f'{bucket}/schemas/land', tmp_path/'far').failed==0
    (a, ra), (b, rb) = answers(path), answers(tmp_path/'far/land')
    assert np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1]) and ra==rb and verify_schema(tmp_path/'far/land').failed==0
    assert {f.path[len(str(tmp_path/'far/land')):] for f in list_files(tmp_path/'far/land')}=={f.path[len(str(path)):] for f in list_files(path)}
    add_embeddings(path, make_embeddings(tmp_path/'m', cells=4, side=6, dim=16, classes=['a','b'], seed=9)[6:])
    p = push_schema(path, f'{bucket}/schemas')
    assert p.failed==0 and sum('collections/' in o.item and o.status=='done' for o in p.outcomes)==3 # the new segment alone
    far = open_schema(tmp_path/'far/land').collection()
    assert pull_schema(f'{bucket}/schemas/land', tmp_path/'far').failed==0
    assert (far.generation, open_schema(tmp_path/'far/land').collection().generation)==(1, 2) and len(far)==216
    assert answers(tmp_path/'far/land')[1]==answers(path)[1]
    assert pull_schema(f'{bucket}/schemas/land', tmp_path/'far').done==0
    with pytest.raises(InputError, match='pull it first'): open_schema(f'{bucket}/schemas/land')

def test_damage_in_the_bucket_does_not_arrive(made, bucket, tmp_path):
    path, files = made
    push_schema(path, f'{bucket}/schemas')
    f = next(f for f in list_files(f'{bucket}/schemas') if f.path.endswith('vectors.npy'))
    from imagesim.infra import read_bytes
    data = bytearray(read_bytes(f.path)); data[500] ^= 1
    write_bytes(f.path, bytes(data))
    s = pull_schema(f'{bucket}/schemas/land', tmp_path/'far')
    assert s.failed==1 and 'vectors.npy' in s.failures[0][0] and 'damaged at its source' in s.failures[0][1]
    assert not generations(tmp_path/'far/land/collections/main')
    write_bytes(f.path, read_bytes(f.path)[:-10])
    assert pull_schema(f'{bucket}/schemas/land', tmp_path/'far').failed==1
    data[500] ^= 1; write_bytes(f.path, bytes(data))
    assert pull_schema(f'{bucket}/schemas/land', tmp_path/'far').failed==0 and answers(tmp_path/'far/land')[1]==answers(path)[1]

def test_changes_on_both_sides_are_not_merged(made, tmp_path):
    path, files = made
    push_schema(path, tmp_path/'shelf'); pull_schema(tmp_path/'shelf/land', tmp_path/'far')
    more = make_embeddings(tmp_path/'m', cells=5, side=6, dim=16, classes=['a','b'], seed=9)
    add_embeddings(path, more[6:7]); add_embeddings(tmp_path/'far/land', more[8:9])
    push_schema(path, tmp_path/'shelf')
    for fn in (lambda: push_schema(tmp_path/'far/land', tmp_path/'shelf'), lambda: pull_schema(tmp_path/'shelf/land', tmp_path/'far')):
        with pytest.raises(InputError, match='changed on both sides'): fn()
    add_embeddings(tmp_path/'far/land', more[9:10])
    with pytest.raises(InputError, match='changed on both sides'): push_schema(tmp_path/'far/land', tmp_path/'shelf')
    with pytest.raises(InputError, match='another encoder'):
        build_schema('land', bundle_at(tmp_path/'b3', hash='3'*64), make_embeddings(tmp_path/'e3', cells=1, side=2, dim=16, encoder_hash='3'*64, classes=['a','b']), root=tmp_path/'s3')
        push_schema(tmp_path/'s3/land', tmp_path/'shelf')

def test_kill_9_leaves_the_former_state(made, tmp_path):
    "Stopped when its first segment is there, and when it writes the index, the schema answers as before; started again, the addition is complete"
    path, files = made
    make_embeddings(tmp_path/'m', cells=16, dates=1, side=12, dim=16, classes=['a','b'], seed=9)
    before, col = answers(path), path/'collections/main'
    code = f'import imagesim.similarity as s; s.SEGMENT_ROWS = 400; s.add_embeddings({str(path)!r}, {str(tmp_path/"m")!r}, quick=True)'
    for kind in ('segments', 'index'):
        held = set(os.listdir(col/'segments'))
        p = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT)
        while p.poll() is None:
            now = {n for n in os.listdir(col/kind) if n[0]!='.'} if (col/kind).exists() else set()
            if now-(held if kind=='segments' else set()): break
            time.sleep(.001)
        p.send_signal(signal.SIGKILL)
        assert p.wait()==-signal.SIGKILL, 'it was stopped on its way'
        assert open_schema(path).collection().generation==1
        now = answers(path)
        assert np.array_equal(now[0][0], before[0][0]) and now[1]==before[1]
        v = verify_schema(path)
        assert v.failed==0 and any(o.status=='skipped' and 'left over' in o.reason for o in v.outcomes)
    add_embeddings(path, tmp_path/'m', quick=True)
    c = open_schema(path).collection()
    assert len(c.units)==3+16 and c.facts['counts']['given']==len(c)
    v = verify_schema(path)
    assert v.failed==0 and not any(o.status=='skipped' for o in v.outcomes) and not any(n[0]=='.' for n in os.listdir(col/'segments'))

def test_queries_of_full_length_are_projected(tmp_path):
    from imagesim.compress import fit_pca, projection_bytes
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500,64)).astype('f4'); x /= np.linalg.norm(x, axis=1, keepdims=True)
    p = fit_pca(x, 16)
    b = bundle_at(tmp_path/'b', features=64, classes=None)
    (b/'projection.safetensors').write_bytes(projection_bytes(p))
    f = make_embeddings(tmp_path/'e', cells=1, dates=1, side=8, dim=16)
    build_schema('x', b, f, root=tmp_path/'s')
    c = open_schema(tmp_path/'s/x').collection()
    assert np.allclose(c.search(x[:3], 5)[0], c.search(p.apply(x[:3]), 5)[0], atol=1e-6)
    with pytest.raises(InputError): c.search(x[:3,:20], 5)

def test_apply_takes_a_schema_to_new_imagery(tmp_path):
    "Delivery -> virtual chips -> vectors of a real network -> collection, and again with nothing to do; then through a schema of fewer numbers"
    from imagesim.bundle import make_bundle
    from imagesim.similarity import apply_schema
    from imagesim.synth import make_delivery
    make_delivery(tmp_path/'d', size=2, dates=1)
    make_bundle(dict(backbone='squeezenet1_0', weights='random', size=64), tmp_path/'b')
    make_schema('land', tmp_path/'b', tmp_path/'s')
    run = lambda: apply_schema(tmp_path/'s/land', tmp_path/'d/chips', ard=tmp_path/'d/ard', embeddings=tmp_path/'d/emb', collection='town', proc=1, workers=0)
    s = run()
    assert s.exit_code==0, s
    c = open_schema(tmp_path/'s/land').collection('town')
    assert len(c)==s.extra['rows']>=4 and verify_schema(tmp_path/'s/land').failed==0
    enc = open_schema(tmp_path/'s/land').encoder
    assert enc.hash==open_schema(tmp_path/'s/land').encoder_hash and c.dim==enc.dim
    again = run()
    assert again.done==0 and again.extra['generation']==1
    # one with a projection takes the vectors of the network itself, those that are there too, and projects them
    build_schema('few', tmp_path/'b', tmp_path/'d/emb', root=tmp_path/'s', pca=2)
    pull_schema(tmp_path/'s/few', tmp_path/'far')
    before = {f.path:f.modified for f in list_files(tmp_path/'d/emb')}
    s = apply_schema(tmp_path/'far/few', tmp_path/'d/chips', ard=tmp_path/'d/ard', embeddings=tmp_path/'d/emb', proc=1, workers=0)
    assert s.exit_code==0 and s.done==0 and s.extra['generation']==1 and {f.path:f.modified for f in list_files(tmp_path/'d/emb')}==before
    shutil.rmtree(tmp_path/'d/emb')
    s = apply_schema(tmp_path/'far/few', tmp_path/'d/chips', 'new', ard=tmp_path/'d/ard', embeddings=tmp_path/'d/emb', proc=1, workers=0)
    few = open_schema(tmp_path/'far/few')
    e = few.collection('new')
    assert s.exit_code==0 and os.listdir(tmp_path/'d/emb')==['squeezenet1_0'] and e.dim==2 and verify_schema(tmp_path/'far/few').failed==0
    assert np.allclose(e.vectors(slice(None)), few._projection(c.vectors(c.find(e.rows['chip'].to_pylist()))), atol=2e-3)

def test_it_opens_without_reading_and_without_torch(made):
    code = f"import sys; from imagesim.similarity import open_schema; c = open_schema({str(made[0])!r}).collection(); c.search(c.vectors([0]), 3)\nprint([m for m in ('torch','faiss','matplotlib','geopandas','duckdb') if m in sys.modules], type(c.segments[0].vectors).__name__)"
    p = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert p.stdout.split()==['[]', 'memmap'], p.stderr

# ---- what changed is replaced, what did not is not

def test_what_changed_in_a_file_reaches_the_schema(made):
    "Vectors, credits, unreadable chips: each alone, under the same fingerprint of the encoder's run"
    path, files = made
    def turned(c, v): return c, np.roll(v, 1, axis=1)
    change(files[0], files[0], turned)
    assert add_embeddings(path, files).done==1
    c, t = open_schema(path).collection(), pq.read_table(files[0])
    assert np.allclose(c.vectors(c.find(t['chip'].to_pylist())), np.array(t['vector'].to_pylist()), atol=1e-3)
    change(files[1], files[1], meta=dict(credits=['(c) Somebody 2026']))
    change(files[2], files[2], meta=dict(unreadable=[['x','y']]))
    assert add_embeddings(path, files).done==2
    c = open_schema(path).collection()
    assert '(c) Somebody 2026' in c.facts['credits'] and c.facts['counts']['unreadable']==1 and len(c)==216
    os.utime(files[3], (5,5))
    assert add_embeddings(path, files).done==0 and open_schema(path).collection().generation==3

def test_files_of_equal_size_and_time_are_told_apart(tmp_path):
    "As tar and some copies leave them"
    files = make_embeddings(tmp_path/'e', cells=6, dates=1, side=2, dim=16)
    for f in files:
        pq.write_table(pq.read_table(f), f, compression='NONE', use_dictionary=False, write_statistics=False)
        os.utime(f, (1.7e9,1.7e9))
    sizes = [f.stat().st_size for f in files]
    same = [f for f,n in zip(files, sizes) if n==max(sizes, key=sizes.count)]
    assert len(same)>1
    b = bundle_at(tmp_path/'b', classes=None)
    build_schema('x', b, same[:1], root=tmp_path/'s')
    assert build_schema('x', b, same, root=tmp_path/'s').done==len(same)-1 and len(open_schema(tmp_path/'s/x').collection().units)==len(same)
    assert build_schema('x', b, same, root=tmp_path/'s').skipped==len(same)

def test_one_file_for_a_cell_and_acquisition(made, tmp_path):
    path, files = made
    other = change(files[0], tmp_path/'o/z17/zone=33'/files[0].name, lambda c,v: (c, -v))
    s = add_embeddings(path, [files[0], other])
    assert s.skipped==1 and s.failed==1 and 'was already in' in s.failures[0][1]

# ---- facts beside the name

def column(name, value):
    return lambda t: t.set_column(t.column_names.index(name), t.schema.field(name), pa.array([value]*len(t), t.schema.field(name).type))

@pytest.mark.parametrize('name,value', [('lon',100.), ('lon',float('nan')), ('lon',1e300), ('lat',None), ('lat',-53.), ('geometry',b''), ('geometry',b'\x01'*93), ('geometry',None), ('lon',374.)])
def test_places_are_where_their_names_say(made, tmp_path, name, value):
    path, files = made
    want = read_unit(files[0]).table
    got = read_unit(change(files[0], tmp_path/'x.parquet', columns=column(name, value))).table
    from shapely import from_wkb
    assert np.allclose(got['lon'], want['lon'], atol=1e-9) and np.allclose(got['lat'], want['lat'], atol=1e-9)
    assert all(a.symmetric_difference(b).area<1e-6*b.area for a,b in zip(from_wkb(got['geometry'].to_pylist()), from_wkb(want['geometry'].to_pylist())))

@pytest.mark.parametrize('zone,quadkey', [(1,'031311102312'), (60,'122222222222'), (33,'310000000000'), (17,'021302131302')])
@pytest.mark.parametrize('level', [12, 15, 17, 19])
def test_the_quick_way_to_a_place_is_right(zone, quadkey, level):
    from imagesim.ard import Cell
    from imagesim.encode import place_corners, wkb_squares
    cell = Cell(zone, quadkey)
    places = [c.id for c in cell.children(level)[::max(1, 4**(level-12)//40)]]
    corners, centre = sim._true_places(cell, places)
    want, lon, lat = place_corners(places)
    turn = lambda d: np.abs((d+180)%360-180).max()
    assert turn(corners-want)<1e-8 and turn(centre[:,0]-lon)<1e-8 and turn(centre[:,1]-lat)<1e-8
    squares = wkb_squares(want)
    if abs(lon).max()<179: assert sim._same_squares(pa.array(squares, pa.binary()), corners).all()
    bow = want[:,[0,2,1,3]]
    assert not sim._same_squares(pa.array(wkb_squares(bow), pa.binary()), corners).any()
    assert sim._same_squares(pa.array([None, *squares[1:]], pa.binary()), corners).tolist()[:1]==[False]

@pytest.mark.parametrize('name,value,why', [('date',2**31-1,'date'), ('date',-2**31,'date'), ('valid',float('inf'),'valid'), ('clear',-.1,'clear'), ('off_nadir',91.,'off_nadir'), ('probs',[60000.,.5],'probabilities'), ('probs',[float('nan'),.5],'probabilities')])
def test_facts_that_can_not_be_are_refused_row_by_row(made, tmp_path, name, value, why):
    path, files = made
    def one(t):
        col = t[name].combine_chunks().cast(pa.int32()).to_pylist() if name=='date' else t[name].to_pylist()
        col[4] = value
        return t.set_column(t.column_names.index(name), t.schema.field(name), pa.array(col, pa.int32()).cast(pa.date32()) if name=='date' else pa.array(col, t.schema.field(name).type))
    s = add_embeddings(path, [change(files[0], tmp_path/'x.parquet', columns=one)])
    c = open_schema(path).collection()
    assert (s.done, s.failed)==(1,0) and len(c)==215 and len(c.refused())==1 and why in c.refused()['reason'][0] and verify_schema(path).failed==0

def test_what_is_not_known_is_no_fault(made, tmp_path):
    path, files = made
    for n in ('date','valid','clear','off_nadir'):
        u = read_unit(change(files[0], tmp_path/'x.parquet', columns=column(n, None)))
        assert len(u.table)==36 and u.table[n].null_count==36

@pytest.mark.parametrize('classes', [['<script>','b'], ['a','a'], [1,2], ['b','a'], [], 5, [['a'],['b']]])
def test_classes_are_the_encoders(made, tmp_path, classes):
    path, files = made
    for collection in ('main', 'fresh'):
        s = add_embeddings(path, [change(files[0], tmp_path/'x.parquet', meta=dict(classes=classes))], collection)
        assert (s.failed, s.done)==(1, 0) and '\n' not in s.failures[0][1]

def test_a_bit_that_flips_inside_a_file_is_seen(tmp_path):
    from imagesim.encode import embedding_schema, table_bytes
    f = make_embeddings(tmp_path, cells=1, dates=1, side=12, dim=16, classes=['a','b'])[0]
    t = pq.read_table(f)
    data = table_bytes(pa.Table.from_arrays([t[n].combine_chunks().cast(embedding_schema(16,['a','b']).field(n).type) for n in t.column_names], schema=embedding_schema(16,['a','b'])), orjson.loads(t.schema.metadata[b'imagesim']))
    m = pq.read_metadata(pa.BufferReader(data))
    ends = [(c.dictionary_page_offset or c.data_page_offset, c.total_compressed_size) for c in map(m.row_group(0).column, range(m.num_columns))]
    missed, tried = 0, 0
    f.write_bytes(data)
    want = read_unit(f)
    for start,n in ends:
        for at in np.random.default_rng(start).integers(start+n//4, start+n, 6):
            bad = bytearray(data); bad[at] ^= 1
            f.write_bytes(bad)
            tried += 1
            with contextlib.suppress(CorruptError):
                u = read_unit(f) # a bit of a page's header that nobody reads
                missed += u.refused!=[] or not u.table.equals(want.table) or not np.array_equal(u.vectors, want.vectors)
    assert missed==0 and tried>80

# ---- projections

def test_vectors_of_the_encoder_below_are_projected_whatever_their_length(tmp_path, monkeypatch):
    from imagesim.compress import fit_pca, projection_bytes
    f = make_embeddings(tmp_path/'e', cells=1, dates=1, side=8, dim=16, encoder_hash='b'*64)
    own = make_embeddings(tmp_path/'o', cells=2, dates=1, side=8, dim=16)[1]
    v = np.array(pq.read_table(f[0])['vector'].to_pylist(), 'f4')
    p = fit_pca(v/np.linalg.norm(v, axis=1, keepdims=True), 16)
    b = bundle_at(tmp_path/'b', base='b'*64, classes=None)
    (b/'projection.safetensors').write_bytes(projection_bytes(p))
    build_schema('x', b, [*f, own], root=tmp_path/'s')
    c = open_schema(tmp_path/'s/x').collection()
    at = c.find(pq.read_table(f[0])['chip'].to_pylist())
    assert np.allclose(c.vectors(at), p.apply(v/np.linalg.norm(v, axis=1, keepdims=True)), atol=1e-5)
    w = np.array(pq.read_table(own)['vector'].to_pylist(), 'f4')
    assert np.allclose(c.vectors(c.find(pq.read_table(own)['chip'].to_pylist())), w, atol=1e-3) and verify_schema(tmp_path/'s/x').failed==0
    facts = sim._unit_facts
    monkeypatch.setattr(sim, '_unit_facts', lambda *a: {k:o for k,o in facts(*a).items() if k not in ('encoder_hash','content')}) # as they were written before
    build_schema('old', b, [*f, own], root=tmp_path/'s')
    assert any('through the projection' in why for _,why in verify_schema(tmp_path/'s/old').failures)

def test_a_projection_has_fewer_numbers(tmp_path):
    from imagesim.bundle import make_bundle
    b = make_bundle(dict(backbone='squeezenet1_0', weights='random', size=32, layer='features.3'), tmp_path/'b')
    f = make_embeddings(tmp_path/'e', cells=1, side=16, dim=b.dim, encoder_hash=b.hash)
    for bad,why in ((b.dim,'to fewer'), (b.dim+1,'to fewer'), (2.5,'whole number'), (True,'whole number'), ('8','whole number'), (0,'whole number'), (-3,'whole number')):
        with pytest.raises(InputError, match=why): build_schema('x', tmp_path/'b', f, root=tmp_path/'s', pca=bad)
    assert not list_files(tmp_path/'s')
    build_schema('x', tmp_path/'b', f, root=tmp_path/'s', pca=b.dim-1)
    assert open_schema(tmp_path/'s/x').collection().dim==b.dim-1

# ---- sharing

def test_a_push_does_not_replace_the_collection_of_somebody_else(tmp_path):
    b = bundle_at(tmp_path/'b', classes=None)
    files = make_embeddings(tmp_path/'e', cells=8, dates=1, side=2, dim=16)
    build_schema('z', b, files[:4], root=tmp_path/'alice'); push_schema(tmp_path/'alice/z', tmp_path/'shelf')
    for i in range(4): build_schema('z', b, files[4:5+i], root=tmp_path/'bob')
    with pytest.raises(InputError, match='or is another one'): push_schema(tmp_path/'bob/z', tmp_path/'shelf')
    with pytest.raises(InputError, match='or is another one'): pull_schema(tmp_path/'bob/z', tmp_path/'shelf')
    assert len(open_schema(tmp_path/'shelf/z').collection())==16 and open_schema(tmp_path/'shelf/z').collection().generation==1
    for i in range(4): build_schema('z', b, files[:5+i], root=tmp_path/'alice') # however far ahead, it grew from what is there
    assert push_schema(tmp_path/'alice/z', tmp_path/'shelf').failed==0 and open_schema(tmp_path/'shelf/z').collection().generation==5
    remove_embeddings(tmp_path/'shelf/z', cells='Z33-1')
    with pytest.raises(InputError, match='pull first'): push_schema(tmp_path/'alice/z', tmp_path/'shelf')

def test_generations_that_do_not_name_their_ancestors_still_open(made, tmp_path):
    "As they were written before: the next one is pushed onto them, and onto the last but one"
    path, files = made
    push_schema(path, tmp_path/'shelf')
    for at in (path, tmp_path/'shelf/land'): resealed(at/'collections/main/generations/00000001.json', lambda g: g.pop('ancestors'))
    for f in files[:2]: remove_embeddings(path, catalog_ids=f.stem.split('_',1)[1])
    assert push_schema(path, tmp_path/'shelf').failed==0 and len(open_schema(tmp_path/'shelf/land').collection())==216-72

def test_what_a_stopped_push_left_in_the_bucket_is_replaced(made, bucket, tmp_path):
    path, files = made
    from imagesim.infra import read_bytes
    w = path/'encoder/weights.safetensors'
    seg = next(f for f in list_files(path) if f.path.endswith('vectors.npy'))
    for f in (str(w), seg.path): write_bytes(f'{bucket}/schemas/land/{os.path.relpath(f, path)}', os.urandom(os.path.getsize(f)))
    assert push_schema(path, f'{bucket}/schemas').failed==0
    assert pull_schema(f'{bucket}/schemas/land', tmp_path/'far').failed==0 and (tmp_path/'far/land/encoder/weights.safetensors').read_bytes()==w.read_bytes()
    write_bytes(f'{bucket}/schemas/land/encoder/weights.safetensors', os.urandom(500)) # and what was damaged later
    p = push_schema(path, f'{bucket}/schemas')
    assert [o.item for o in p.outcomes if o.status=='done']==['encoder/weights.safetensors'] and read_bytes(f'{bucket}/schemas/land/encoder/weights.safetensors')==w.read_bytes()

def test_fingerprints_of_a_bucket(tmp_path):
    data = os.urandom(11*2**20+5)
    (tmp_path/'f').write_bytes(data); (tmp_path/'empty').write_bytes(b'')
    md5 = lambda d: hashlib.md5(d).digest()
    parts = lambda n: hashlib.md5(b''.join(md5(data[a:a+n]) for a in range(0, len(data), n))).hexdigest()
    assert sim._is_etag(tmp_path/'f', md5(data).hex()) and sim._is_etag(tmp_path/'empty', md5(b'').hex())
    assert sim._is_etag(tmp_path/'f', parts(8*2**20)+'-2') and sim._is_etag(tmp_path/'f', parts(5*2**20)+'-3')
    assert not any(sim._is_etag(tmp_path/'f', o) for o in (None, '', 'x', '0'*32, '0'*32+'-2', parts(8*2**20)+'-3', md5(data).hex()+'-1'))

# ---- what verify, list and the rest say

def test_lost_generations_and_stray_files_are_named(made):
    path, files = made
    (path/'collections/main/evil.txt').write_text('x'); (path/'notes.md').write_text('x')
    assert {n for n,_ in verify_schema(path).failures}=={'collections/main/evil.txt', 'notes.md'}
    for n in ('collections/main/evil.txt', 'notes.md', 'collections/main/generations/00000001.json'): (path/n).unlink()
    assert verify_schema(path).failures[0][0]=='collections/main' and 'no generation' in verify_schema(path).failures[0][1]

def test_a_disk_that_takes_no_more_is_one_line(made, tmp_path):
    path, files = made
    more = make_embeddings(tmp_path/'m', cells=1, side=16, dim=16, classes=['a','b'], seed=9)
    before, limit, old = answers(path)[1], resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
        with pytest.raises(StorageError, match='File too large'): add_embeddings(path, more)
        s = push_schema(path, tmp_path/'shelf')
        assert s.failed and all('\n' not in why for _,why in s.failures)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limit); signal.signal(signal.SIGXFSZ, old)
    assert answers(path)[1]==before and verify_schema(path).failed==0
    for n,say in ((errno.ENOSPC,'disk is full'), (errno.EROFS,'can not be written to'), (errno.EACCES,'can not be written to'), (errno.EIO,'Input/output')):
        with pytest.raises(StorageError, match=say):
            with storing(tmp_path): raise OSError(n, os.strerror(n))

def test_a_quick_index_takes_some_rows(tmp_path):
    s = build_schema('x', bundle_at(tmp_path/'b', classes=None), make_embeddings(tmp_path/'e', cells=1, side=2, dim=16), root=tmp_path/'s', quick=True)
    assert 'takes 50 rows, and there are 8' in s.extra['search']
    assert build_schema('x', tmp_path/'b', tmp_path/'e', root=tmp_path/'s', quick=True).extra['generation']==1

def test_finer_cells_are_not_taken_out_of_a_cell(made):
    path, files = made
    c = open_schema(path).collection()
    with pytest.raises(InputError, match=f"name {c.rows['cell'][0].as_py()}"): remove_embeddings(path, cells=c.rows['place'][0].as_py())
    assert open_schema(path).collection().generation==1
