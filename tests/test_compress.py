"""Shorter vectors: against scikit-learn where it does the same, against brute force, and on whatever shapes hypothesis thinks of"""
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from imagesim.compress import (Projection, code_losses, fit_pca, from_int8, hamming, neighbours, projection_bytes, read_projection, recall_at, to_binary, to_int8,
    unit)
from imagesim.infra import CorruptError, InputError, MissingError

def cloud(n=500, d=40, seed=0):
    rng = np.random.default_rng(seed)
    return unit(rng.normal(size=(n,8))@rng.normal(size=(8,d))+.1*rng.normal(size=(n,d))+.3)

finite = hnp.arrays('f4', hnp.array_shapes(min_dims=2, max_dims=2, max_side=20), elements=st.floats(-100, 100, width=32))

def test_pca_is_the_one_of_scikit_learn():
    from sklearn.decomposition import PCA
    v = cloud()
    for whiten in (False, True):
        ours, theirs = fit_pca(v, 6, whiten=whiten), PCA(6, whiten=whiten, svd_solver='full').fit(v)
        a, b = (v-ours.mean)@ours.components.T, theirs.transform(v)
        assert np.allclose(np.abs(a), np.abs(b), atol=2e-3)
        assert abs(ours.explained-theirs.explained_variance_ratio_.sum())<1e-4

def test_randomised_directions_on_long_vectors():
    v = cloud(300, 2500)
    p, exact = fit_pca(v, 8), np.linalg.svd(v-v.mean(0), full_matrices=False)[2][:8]
    assert np.linalg.norm(p.components@exact.T, axis=1).min()>.99 and np.array_equal(fit_pca(v, 8).components, p.components)

def test_a_sample_is_drawn_the_same_way_each_time():
    v = cloud(2000)
    assert np.array_equal(fit_pca(v, 4, sample=300).components, fit_pca(v, 4, sample=300).components)
    assert not np.array_equal(fit_pca(v, 4, sample=300).components, fit_pca(v, 4, sample=300, seed=1).components)

@pytest.mark.parametrize('v,dim,why', [(cloud(5), 5, '1 to 4'), (cloud(), 41, '1 to 40'), (cloud(), 0, '1 to 40'), (np.full((9,4), np.nan, 'f4'), 2, 'NaN'), (cloud(), 2.5, 'whole number'), (cloud(), True, 'whole number'), (cloud(), '8', 'whole number')])
def test_impossible_projections(v, dim, why):
    with pytest.raises(InputError, match=why): fit_pca(v, dim)

def test_equal_vectors_do_not_divide_by_zero():
    v = np.repeat(cloud(1), 50, 0)
    for whiten in (False, True): assert np.isfinite(fit_pca(v, 3, whiten=whiten).apply(v)).all()

@given(finite)
@settings(max_examples=60, deadline=None)
def test_int8_errs_by_half_a_step(v):
    for per in ('dimension', 'all'):
        codes, scale = to_int8(v, per=per)
        assert codes.dtype==np.int8 and (np.abs(from_int8(codes, scale)-v)<=scale/2*1.001+1e-6).all()
        assert np.array_equal(to_int8(v, scale)[0], codes)

@given(finite, st.integers(0, 2**32-1))
@settings(max_examples=60, deadline=None)
def test_hamming_counts_bits(v, seed):
    w = np.random.default_rng(seed).normal(size=(3, v.shape[1])).astype('f4')
    a, middle = to_binary(v)
    b = to_binary(w, middle)[0]
    bits = lambda x: np.unpackbits(x, axis=1)
    assert np.array_equal(hamming(b, a), (bits(b)[:,None]!=bits(a)[None]).sum(2))

def test_neighbours_against_brute_force():
    v = cloud(700)
    got = neighbours(v, v, 7, own=np.arange(700))
    s = v@v.T
    np.fill_diagonal(s, -9)
    assert np.allclose(np.take_along_axis(s, got, 1), -np.sort(-s, 1)[:,:7], atol=1e-6) and not (got==np.arange(700)[:,None]).any()
    assert recall_at(got[:,::-1], got)==1 and recall_at(got, (got+1)%700)<.5

def test_projection_travels_and_damage_is_named(tmp_path):
    p = fit_pca(cloud(), 5, whiten=True)
    data = projection_bytes(p)
    assert projection_bytes(p)==data
    (tmp_path/'p').write_bytes(data)
    q = read_projection(tmp_path/'p')
    assert q.whiten and np.array_equal(q.components, p.components) and q.explained==pytest.approx(p.explained)
    for broken in (data[:-9], b'', b'x'*100, data[:40]):
        with pytest.raises(CorruptError): read_projection(broken)
    with pytest.raises(CorruptError, match='finite'): read_projection(projection_bytes(Projection(p.mean*np.float32('nan'), p.components)))
    with pytest.raises(CorruptError, match='not a projection'): read_projection(projection_bytes(Projection(p.mean[1:], p.components)))
    with pytest.raises(MissingError): read_projection(tmp_path/'q')

def test_losses_fall_as_codes_shrink():
    t = code_losses(cloud(900, 64), dims=(None, 8), queries=100).set_index(['dim','code'])['recall@10']
    assert t[64,'float32']==1 and t[64,'float16']>.98 and t[64,'int8']>.9 and t[64,'binary']<t[64,'int8'] and t[8,'float32']<1
    with pytest.raises(InputError): code_losses(cloud(9))
