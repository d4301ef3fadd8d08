"""Figures of retrieval against slow and plain references: ties, masks, places, blocks, and real pictures."""
from itertools import permutations

import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from sklearn.metrics import average_precision_score, ndcg_score

import imagesim.retrieval as R
from imagesim.infra import InputError
from imagesim.nearest import cluster_vectors
from imagesim.retrieval import bootstrap_means, compare_retrieval, evaluate_retrieval, label_overlap, plot_retrieval, rank_measures

def plain(right, gains, ks, most):
    "The figures of one list without equals, in words"
    n, total, out = len(right), sum(right), {}
    hits = [sum(right[:i+1])/(i+1) for i in range(n) if right[i]]
    out['mAP'] = sum(hits)/total
    for k in ks:
        out[f'mAP@{k}'] = sum(sum(right[:i+1])/(i+1) for i in range(min(k,n)) if right[i])/min(total, k)
        out[f'P@{k}'] = sum(right[:k])/min(k, n)
    dcg = lambda g: sum(x/np.log2(i+2) for i,x in enumerate(g))
    best = sorted(gains, reverse=True)
    for name,k in [('nDCG',n), *((f'nDCG@{k}',k) for k in ks)]: out[name] = dcg(gains[:k])/dcg(best[:k])
    K = min(4*total, 2*most)
    ranks = [i+1 if i+1<=K else 1.25*K for i in range(n) if right[i]]
    out['ANMRR'] = (sum(ranks)/total-.5-total/2)/(1.25*K-.5*(1+total))
    return out

def averaged(scores, right, gains, ks, most):
    "The mean over all orders in which equals could come"
    orders = {tuple(sorted(p, key=lambda i: -scores[i])) for p in permutations(range(len(scores)))}
    each = [plain([right[i] for i in o], [gains[i] for i in o], ks, most) for o in orders]
    return {k:np.mean([e[k] for e in each]) for k in each[0]}

lists = st.integers(2, 6).flatmap(lambda n: st.tuples(st.lists(st.integers(-2,2), min_size=n, max_size=n), st.lists(st.booleans(), min_size=n, max_size=n).filter(any),
    st.lists(st.sampled_from([0.,.25,.5,1.]), min_size=n, max_size=n).filter(any)))

@settings(max_examples=60, deadline=None)
@given(lists, st.integers(0,3))
def test_equal_scores_count_as_the_mean_over_their_orders(data, extra):
    scores, right, gains = data
    most = sum(right)+extra
    got, want = rank_measures(scores, right, gains, ks=(1,2,4), most=most), averaged(scores, right, gains, (1,2,4), most)
    assert set(got)==set(want)
    for k in want: assert got[k]==pytest.approx(want[k], abs=1e-12), k

@settings(max_examples=60, deadline=None)
@given(lists, st.randoms())
def test_figures_are_between_0_and_1_and_depend_on_the_order_alone(data, random):
    scores, right, gains = data
    got = rank_measures(scores, right, gains)
    assert all(-1e-12<=v<=1+1e-12 for v in got.values())
    at = list(range(len(scores))); random.shuffle(at)
    moved = rank_measures([scores[i]*.01-7 for i in at], [right[i] for i in at], [gains[i] for i in at])
    assert moved==pytest.approx(got)

def test_known_values():
    m = rank_measures([-1,-2,-3,-4], [1,0,0,1], ks=(1,2)) # all below 0
    assert m['mAP']==pytest.approx((1+2/4)/2) and m['P@1']==1 and m['P@2']==.5 and m['mAP@2']==pytest.approx(.5)
    assert m['ANMRR']==pytest.approx(((1+4)/2-1.5)/(5-1.5)) # NG = GTM = 2, K = 4
    perfect, lost = rank_measures([3,2,1,0], [1,1,0,0]), rank_measures(np.arange(20)[::-1], np.arange(20)>=18)
    assert perfect['mAP']==perfect['nDCG']==1 and perfect['ANMRR']==0 and lost['ANMRR']==1
    assert rank_measures([2,1,0], [0,0,1], ks=(50,))['P@50']==pytest.approx(1/3) # a short list is taken as it is

def test_limit_of_anmrr_looks_at_the_largest_query():
    few = rank_measures([5,4,3,2,1], [0,0,0,1,0], most=1)['ANMRR'] # K = 2: beyond it
    many = rank_measures([5,4,3,2,1], [0,0,0,1,0], most=9)['ANMRR'] # K = 4: at it
    assert few==1 and many==pytest.approx(3/4)

def test_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    for _ in range(20):
        s, g = rng.normal(size=40), rng.choice([0,.2,.5,1], 40)
        m = rank_measures(s, g>=.5, g, ks=(10,))
        assert m['mAP']==pytest.approx(average_precision_score(g>=.5, s)) and m['nDCG']==pytest.approx(ndcg_score([g],[s])) and m['nDCG@10']==pytest.approx(ndcg_score([g],[s],k=10))

def slow(v, right, gains, drop, ks):
    v = v/np.linalg.norm(v, axis=1, keepdims=True)
    most, out = max(int((right[i]&~drop[i]).sum()) for i in range(len(v))), []
    for i in range(len(v)):
        o = [j for j in np.argsort(-(v@v[i]), kind='stable') if not drop[i,j]]
        out.append(plain([bool(right[i,j]) for j in o], [gains[i,j] for j in o], ks, most) if any(right[i,j] for j in o) else None)
    return out

@pytest.fixture(scope='module')
def town():
    rng = np.random.default_rng(1)
    y = (rng.random((40,4))<.4).astype(float)
    y = np.concatenate([y,y]); y[rng.random(y.shape)<.25] = np.nan
    return rng.normal(size=(80,12)), y, np.tile([f'p{i}' for i in range(40)], 2)

def pairwise(y):
    over, known = np.zeros((len(y),)*2), np.zeros((len(y),)*2, bool)
    for i,a in enumerate(y):
        for j,b in enumerate(y):
            both = ~np.isnan(a)&~np.isnan(b)
            either = ((a[both]==1)|(b[both]==1)).sum()
            known[i,j] = either>0
            if either: over[i,j] = ((a[both]==1)&(b[both]==1)).sum()/either
    return over, known

def test_overlap_leaves_out_what_either_does_not_know(town):
    y = town[1]
    over, known = label_overlap(y, ~np.isnan(y), y, ~np.isnan(y))
    want, there = pairwise(y)
    assert (known==there).all() and np.allclose(np.where(known, over, 0), want)

@pytest.mark.parametrize('own_place', [True, False])
def test_labels_agree_with_a_plain_reference_in_blocks_of_any_size(town, own_place, monkeypatch):
    v, y, place = town
    over, known = pairwise(y)
    drop = ~known|np.eye(80, dtype=bool)|(False if own_place else place[:,None]==place[None])
    want = slow(v, over>=.5, over, drop, (1,7))
    monkeypatch.setattr(R, '_CELLS', 300)
    got = evaluate_retrieval(v, y, places=place, own_place=own_place, ks=(1,7), draws=5)
    monkeypatch.setattr(R, '_CELLS', 2**20)
    whole = evaluate_retrieval(v, y, places=place, own_place=own_place, ks=(1,7), draws=5)
    np.testing.assert_allclose(got.values, whole.values, atol=1e-12)
    for i,w in enumerate(want):
        if w is None: assert np.isnan(got.values[i]).all()
        else: np.testing.assert_allclose(got.values[i], [w[m] for m in got.measures], atol=1e-6, err_msg=str(i))
    assert got['mAP']==pytest.approx(np.mean([w['mAP'] for w in want if w]))

def test_mask_says_the_same_as_nan(town):
    v, y, _ = town
    a, b = evaluate_retrieval(v, y, draws=0), evaluate_retrieval(v, np.where(np.isnan(y), 7, y), mask=~np.isnan(y), draws=0)
    np.testing.assert_array_equal(a.values, b.values)

def test_scenes_judge_and_labels_grade(town):
    v, y, _ = town
    scenes = np.arange(80)%5
    both, scene = evaluate_retrieval(v, y, scenes=scenes, draws=0), evaluate_retrieval(v, scenes=scenes, draws=0)
    assert both['mAP']==scene['mAP'] and both['nDCG']!=scene['nDCG']

def test_queries_and_gallery(town):
    v, _, _ = town
    scenes, te = np.arange(80)%5, np.arange(80)<20
    a = evaluate_retrieval(v, scenes=scenes, queries=te, gallery=~te, ks=(3,), draws=0)
    u = v/np.linalg.norm(v, axis=1, keepdims=True)
    for i in (0,7): assert a.values[i,a.measures.index('P@3')]==pytest.approx((scenes[20+np.argsort(-(u[20:]@u[i]))[:3]]==scenes[i]).mean())
    assert evaluate_retrieval(v, scenes=scenes, queries=[5], draws=0).values[0]==pytest.approx(evaluate_retrieval(v, scenes=scenes, draws=0).values[5])

def test_unknown_scenes_neither_ask_nor_answer(town):
    v, scenes = town[0], (np.arange(80)%5).astype(object)
    scenes[:10] = None
    r = evaluate_retrieval(v, scenes=scenes, draws=0)
    assert np.isnan(r.values[:10]).all() and r.answerable==70
    np.testing.assert_allclose(r.values[10:], evaluate_retrieval(v[10:], scenes=scenes[10:], draws=0).values)

def test_copies_are_equals_whatever_their_order():
    v = np.repeat(cluster_vectors(30, 64, groups=5, seed=2), 3, axis=0)
    scenes = np.random.default_rng(0).integers(4, size=90)
    order = np.random.default_rng(1).permutation(90)
    a, b = evaluate_retrieval(v, scenes=scenes, draws=0), evaluate_retrieval(v[order]*3.7, scenes=scenes[order], draws=0)
    np.testing.assert_allclose(a.values[order], b.values, atol=1e-12)

def test_intervals_cover_and_follow_the_seed():
    v, scenes = cluster_vectors(300, 32, groups=6, spread=2., seed=3), np.arange(300)%6
    a, b, c = (evaluate_retrieval(v, scenes=scenes, draws=100, seed=s) for s in (0,0,1))
    assert a.table.equals(b.table) and not a.table.equals(c.table)
    assert (a.table.low<=a.table.value).all() and (a.table.value<=a.table.high).all()

def test_places_are_drawn_whole():
    values = np.repeat(np.random.default_rng(0).random((50,1)), 8, axis=0)
    rows, places = bootstrap_means(values, None, 400), bootstrap_means(values, np.repeat(np.arange(50), 8), 400)
    assert places.std()>2*rows.std()
    assert places.std()==pytest.approx(values[::8].std()/50**.5, rel=.2)

def test_differences_are_paired():
    v = cluster_vectors(200, 32, groups=8, spread=2., seed=5)
    scenes = np.arange(200)%8
    scenes = np.argmax(v[:,:8], axis=1)
    c = compare_retrieval({'a':v, 'b':v+.02*np.random.default_rng(0).normal(size=v.shape), 'same':v.copy()}, scenes=scenes, draws=200)
    t = c.table.loc['mAP']
    assert (t.loc['same',['gain','gain_low','gain_high']]==0).all()
    assert t.gain_high['b']-t.gain_low['b']<.7*(t.high['b']-t.low['b'])
    assert 'P@10' in repr(c) and plot_retrieval(c).axes and c.results['a'].by(scenes).queries.sum()==c['a'].answerable

@pytest.mark.parametrize('kw,say', [(dict(), 'give labels or scenes'), (dict(scenes=np.zeros(80), threshold=0), 'threshold is 0'), (dict(scenes=np.zeros(80), ks=(0,)), 'whole numbers from 1'),
    (dict(scenes=np.zeros(80), queries=np.zeros(80,bool)), 'no row'), (dict(scenes=np.zeros(80), gallery=[99]), 'rows are 0 to 79'), (dict(labels=np.full((80,2),2)), 'they are 0 or 1'),
    (dict(labels=np.zeros((80,2))), 'anything to find'), (dict(scenes=np.zeros(80), own_place=False), 'needs places'), (dict(scenes=np.zeros((80,2))), 'one a vector')])
def test_refuses(town, kw, say):
    with pytest.raises(InputError, match=say): evaluate_retrieval(town[0], **kw)

def test_real_pictures_through_the_chain(shared):
    from imagesim.encode import encode_pictures
    t = pd.read_csv(shared/'ucm/multilabels.csv')
    t = t[t.split=='test'].groupby('scene').head(5).reset_index(drop=True)
    v = encode_pictures(dict(backbone='squeezenet1_0', weights=str(shared/'weights/squeezenet1_0-imagenet.safetensors'), size=112), [shared/'ucm/images'/f for f in t.Feature])[0]
    y = t.drop(columns=['Feature','scene','split']).to_numpy()
    r = evaluate_retrieval(v, y, scenes=t.scene, ks=(1,5), draws=200)
    u = v/np.linalg.norm(v, axis=1, keepdims=True)
    s = u.astype(float)@u.T.astype(float); same = t.scene.to_numpy()[:,None]==t.scene.to_numpy()[None]
    ap = [average_precision_score(np.delete(same[i], i), np.delete(s[i], i)) for i in range(len(v))]
    np.testing.assert_allclose(r.values[:,0], ap, atol=1e-6)
    assert r['mAP']>4*r.chance and r.table.low['P@1']>.4

@pytest.mark.parametrize('scenes', [['a','a',np.nan,np.nan,np.nan,'b'], np.array(['a','a',None,None,np.nan,'b'], object), pd.Series(['a','a',None,None,None,'b'])])
def test_what_has_no_name_is_no_scene(scenes):
    v = np.random.default_rng(0).normal(size=(6,8))
    r = evaluate_retrieval(v, scenes=scenes, places=scenes, ks=(1,), draws=9)
    assert r.right.tolist()==[1,1,0,0,0,0] and r.told.startswith('6 queries in a gallery of 6, leave one out; to be found: the same scene, 1.0 on average; 4 queries left out')
    with pytest.raises(InputError, match='has anything to find'): evaluate_retrieval(v, scenes=[np.nan]*6)

def test_names_are_no_formulas(tmp_path):
    v = {'$x_{$':np.random.default_rng(0).normal(size=(30,8)), 'a$b$c':np.random.default_rng(1).normal(size=(30,8))}
    fig = plot_retrieval(compare_retrieval(v, scenes=np.arange(30)%3, draws=20), credit='$ \\bad_{$')
    fig.savefig(tmp_path/'r.png')
    assert [o.get_text() for o in fig.axes[0].get_yticklabels()]==list(v)
