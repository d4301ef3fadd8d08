"""The nearest vectors: exact against sorting everything, the quick index against its card, filters, damaged files."""
import numpy as np, pytest
from hypothesis import given, settings, strategies as st

from imagesim.infra import CorruptError, InputError
from imagesim.nearest import (Coded, VectorIndex, check_coded, cluster_vectors, exact_search, held_out, lists_for, open_coded, recall_card, share_interval, train_lists, unit_vectors)
import imagesim.nearest as nearest

@pytest.fixture(scope='module')
def many(): return cluster_vectors(40_000, 48, groups=150, seed=3)

@pytest.fixture(scope='module')
def index(many): return VectorIndex.build(many, quick=True, queries=300)

def sorting(q, v, k, mask=None):
    "Scores and rows by sorting everything, in double precision"
    rows = np.arange(len(v)) if mask is None else np.flatnonzero(mask)
    s = (unit_vectors(q).astype('f8')@v[rows].astype('f8').T).clip(-1,1).astype('f4')
    out_s, out_r = np.full((len(q),k), -np.inf, 'f4'), np.full((len(q),k), -1)
    for i,o in enumerate(s):
        order = np.lexsort((rows, -o))[:k]
        out_s[i,:len(order)], out_r[i,:len(order)] = o[order], rows[order]
    return out_s, out_r

@settings(max_examples=60, deadline=None)
@given(st.integers(1,400), st.integers(1,12), st.integers(1,9), st.integers(1,450), st.integers(0,10**6), st.sampled_from(['none','wide','narrow','empty','numbers']), st.booleans())
def test_exact_is_sorting(n, dim, q, k, seed, how, ties):
    rng = np.random.default_rng(seed)
    v = unit_vectors(rng.normal(size=(n,dim))+1e-3)
    if ties: v = v[rng.integers(0, max(1,n//4), n)]
    queries = rng.normal(size=(q,dim))*rng.uniform(.1,100)
    mask = dict(none=None, wide=rng.random(n)<.7, narrow=rng.random(n)<.05, empty=np.zeros(n,bool), numbers=rng.random(n)<.3)[how]
    cuts = sorted(rng.integers(0, n+1, 2))
    s, r = exact_search(queries, [v[:cuts[0]], v[cuts[0]:cuts[1]], v[cuts[1]:]], k, np.flatnonzero(mask) if how=='numbers' else mask)
    s0, r0 = sorting(queries, v, k, mask)
    assert np.array_equal(r>=0, r0>=0) and np.allclose(s, s0, atol=1e-6)
    sure = (r!=r0)&(np.abs(np.maximum(s,-9)-np.maximum(s0,-9))>1e-6)
    assert not sure.any()
    if mask is not None: assert mask[r[r>=0]].all()
    assert all(len(set(o[o>=0]))==(o>=0).sum() for o in r)

def test_equal_scores_come_by_row_whatever_the_blocks(monkeypatch):
    v = np.repeat(cluster_vectors(40, 16, groups=3), 50, axis=0)
    whole = exact_search(v[:100:10], v, 60)
    assert np.array_equal(whole[1][0,:50], np.arange(50))
    scan = nearest._scan
    for size in (64, 333, 1999):
        monkeypatch.setattr(nearest, '_scan', lambda q,r,k,m,_s,size=size: scan(q, r, k, m, size))
        for got,want in zip(exact_search(v[:100:10], v, 60), whole): assert np.array_equal(got, want)

def test_one_query_and_many_give_the_same(many):
    one = [exact_search(q, many, 10) for q in many[:30]]
    s, r = exact_search(many[:30], many, 10)
    assert np.array_equal(np.concatenate([o[0] for o in one]), s) and np.array_equal(np.concatenate([o[1] for o in one]), r)

def test_vectors_with_nan_are_never_found():
    v = cluster_vectors(3000, 8, groups=5)
    v[::3] = np.nan
    s, r = exact_search(v[1:3], v, 2500)
    assert np.isfinite(s[r>=0]).all() and (r[r>=0]%3>0).all() and ((r>=0).sum(axis=1)==2000).all()

def test_nothing_at_all():
    s, r = exact_search(np.ones((2,8)), np.empty((0,8),'f4'), 3)
    assert (r==-1).all() and np.isneginf(s).all()
    assert exact_search(np.empty((0,8)), cluster_vectors(10,8,2), 3)[1].shape==(0,3)
    assert len(VectorIndex.build(np.empty((0,8),'f4'), quick=True))==0

@pytest.mark.parametrize('bad', [0, -1, 2.5, True, '3', None])
def test_k_must_be_a_number(many, bad):
    with pytest.raises(InputError, match='k must be'): exact_search(many[0], many, bad)

@pytest.mark.parametrize('bad', [np.full(48, np.nan), np.zeros(48), np.full(48, np.inf), np.ones(47), 'words'])
def test_queries_that_point_nowhere(many, index, bad):
    with pytest.raises(InputError): exact_search(bad, many, 3)
    with pytest.raises(InputError): index.search(bad, 3)

@pytest.mark.parametrize('bad', [np.ones(3,bool), [-1], [40_000], [.5], np.ones((2,2),int), ['a']])
def test_filters_that_fit_nothing(many, bad):
    with pytest.raises(InputError): exact_search(many[0], many, 3, bad)

def test_the_card_tells_the_truth(many, index):
    "Queries of its own: the measured recall lies within the interval, give or take"
    rows = np.setdiff1d(np.arange(40_000), held_out(40_000, 300))[::80]
    assert index.serves and index.card['low']>=index.card['bar']
    truth, got = (index.search(many[rows], 10, exact=e)[1] for e in (True, False))
    recall = np.mean([len(set(a)&set(b))/10 for a,b in zip(truth,got)])
    assert recall>=index.card['low']-.02
    assert [c['probes'] for c in index.card['curve']]==[2**i for i in range(len(index.card['curve']))]

def test_scores_do_not_depend_on_the_way(many, index):
    a, b = index.search(many[:200], 10, exact=True), index.search(many[:200], 10, exact=False)
    scores = {(i,r):s for i,(rs,ss) in enumerate(zip(*a[::-1])) for r,s in zip(rs,ss)}
    shared = [(scores[i,r],s) for i,(rs,ss) in enumerate(zip(*b[::-1])) for r,s in zip(rs,ss) if (i,r) in scores]
    assert len(shared)>1500 and all(x==y for x,y in shared)

@pytest.mark.parametrize('share', [1, .95, .8, .3, .01, .0002, 0])
def test_a_filter_never_leaves_fewer_than_k(many, index, share):
    mask = np.random.default_rng(1).random(40_000)<share
    for exact in (None, False):
        s, r = index.search(many[:50], 20, mask, exact)
        assert ((r>=0).sum(axis=1)==min(20, mask.sum())).all() and mask[r[r>=0]].all()

def test_a_filter_that_takes_away_what_is_near_is_noticed(many, index):
    for q in range(0, 40_000, 8000):
        mask = np.zeros(40_000, bool)
        mask[np.argsort(many@many[q])[:34_000]] = True
        assert np.array_equal(index.search(many[q], 10, mask)[1], exact_search(many[q], many, 10, mask)[1])

def test_more_than_was_measured_is_searched_exactly(many, index):
    assert np.array_equal(index.search(many[:3], 500)[1], exact_search(many[:3], many, 500)[1])

def test_below_the_bar_it_refuses():
    noise = unit_vectors(np.random.default_rng(0).normal(size=(8000,64)))
    ix = VectorIndex.build(noise, quick=True, queries=200)
    assert not ix.serves and 'the bar is 0.95' in ix.why_exact
    assert np.array_equal(ix.search(noise[:5], 5)[1], exact_search(noise[:5], noise, 5)[1])
    with pytest.raises(InputError, match='the bar is 0.95'): ix.search(noise[:5], 5, exact=False)

def test_small_ones_are_exact_unless_asked(many):
    assert VectorIndex.build(many).card is None and 'no quick index' in VectorIndex.build(many).why_exact
    with pytest.raises(InputError, match='can not be divided'): train_lists(many[:20], 64)

def test_same_seed_same_index(many):
    a, b = (VectorIndex.build(many[:10_000], quick=True, queries=100, seed=5) for _ in 'ab')
    assert np.array_equal(a.lists.centroids, b.lists.centroids) and np.array_equal(a.coded[0].codes, b.coded[0].codes) and a.card['recall']==b.card['recall']

def test_add_remove_and_disk(many, index, tmp_path):
    new = cluster_vectors(300, 48, groups=150, seed=11)
    grown = index.add(new*7)
    assert np.array_equal(grown.search(new, 1, exact=True)[1][:,0], 40_000+np.arange(300)) and len(index)==40_000
    less = grown.remove(np.arange(0, 40_300, 2))
    want = np.concatenate([many, new])[1::2]
    assert np.allclose(less.rows.take(np.arange(len(less))), want, atol=1e-6)
    less.save(tmp_path/'i')
    again = VectorIndex.open(tmp_path/'i')
    for e in (True, None):
        for a,b in zip(again.search(new[:50], 10, exact=e), less.search(new[:50], 10, exact=e)): assert np.array_equal(a, b)
    assert isinstance(again.rows.parts[0].base, np.memmap) and again.card==less.card
    with pytest.raises(InputError, match='not empty'): less.save(tmp_path/'i')

def test_codes_cut_are_codes_of_the_cut(many, index):
    c = index.coded[0]
    cut = check_coded(c.cut(1000, 9000), 8000, 48, len(index.lists))
    direct = index.lists.encode(many[1000:9000])
    for i in range(len(index.lists)):
        a, b = (dict(zip(o.order[o.starts[i]:o.starts[i+1]].tolist(), map(bytes, o.codes[o.starts[i]:o.starts[i+1]]))) for o in (cut, direct))
        assert a==b

@pytest.fixture
def saved(many, tmp_path):
    VectorIndex.build(many[:4000], quick=True, queries=50).save(tmp_path/'i')
    return tmp_path/'i'

def replace(path, a):
    with open(path, 'wb') as f: np.save(f, a)

@pytest.mark.parametrize('name,change', [
    ('order-0', lambda a: a+1), ('order-0', lambda a: a*0), ('order-0', lambda a: a.astype('i8')), ('order-0', lambda a: -a-1), ('starts-0', lambda a: a[::-1].copy()), ('starts-0', lambda a: a+1),
    ('starts-0', lambda a: a[:-1]), ('codes-0', lambda a: a[:-1]), ('codes-0', lambda a: a[:,:-1].copy()), ('centroids', lambda a: a[:-1]), ('ranges', lambda a: a[:-1]), ('vectors-0', lambda a: a[:,1:].copy()),
    ('vectors-0', lambda a: a.astype('f8')), ('vectors-0', lambda a: np.asfortranarray(a))])
def test_arrays_that_do_not_fit_are_refused(saved, name, change):
    replace(saved/f'{name}.npy', change(np.load(saved/f'{name}.npy')))
    with pytest.raises(CorruptError): VectorIndex.open(saved).filled()

@pytest.mark.parametrize('data', [b'', b'\x93NUMPY', b'x'*500, b'\x93NUMPY\x01\x00\x76\x00{"descr": __import__("os").system("true")}'.ljust(200)])
def test_files_that_are_no_arrays(saved, data):
    (saved/'vectors-0.npy').write_bytes(data)
    with pytest.raises(CorruptError): VectorIndex.open(saved)

def test_pickled_arrays_are_refused(saved):
    with open(saved/'order-0.npy', 'wb') as f: np.save(f, np.array([{'a':1}]*4000, object), allow_pickle=True)
    with pytest.raises(CorruptError): VectorIndex.open(saved).filled()

@given(st.floats(0,1), st.integers(1,10_000))
def test_intervals_hold_their_share(p, n):
    low, high = share_interval(p, n)
    assert 0<=low<=p+1e-9 and p-1e-9<=high<=1

def test_threads_share_one_index(many, index, tmp_path):
    from concurrent.futures import ThreadPoolExecutor
    want = index.search(many[:40], 10)[1]
    fresh = VectorIndex(many, index.lists, [lambda: index.coded[0]], index.card)
    with ThreadPoolExecutor(4) as pool: got = list(pool.map(lambda i: fresh.search(many[i], 10)[1][0], range(40)))
    assert np.array_equal(np.array(got), want)
