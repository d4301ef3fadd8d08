"""The losses against torch, torchvision and scikit-learn; their gradients; what must not count"""
import math

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from sklearn.metrics import jaccard_score, log_loss
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from imagesim.infra import ImagesimError, InputError
from imagesim.loss import LOSSES, LossError, LossValue, asymmetric_loss, bce_loss, check_loss, class_weights_of, contrastive_loss, jaccard_overlap, make_loss

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    "So little arithmetic is slower on several threads"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def batch(seed, n=6, c=4, d=5, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    z = F.normalize(torch.randn(n, d, generator=g, dtype=dtype), dim=1)
    return (torch.randn(n, c, generator=g, dtype=dtype)*3, z, (torch.rand(n, c, generator=g)<.4).to(dtype), torch.rand(n, c, generator=g)<.7, torch.randint(0, n//2, (n,), generator=g))

def gradients(name, logits, z, labels, mask, places):
    "The loss, and its gradients by logits and embeddings"
    logits, z = logits.clone().requires_grad_(), z.clone().requires_grad_()
    total = make_loss(name)(logits, z, labels, mask, places).total
    return total, *[torch.zeros_like(o) if g is None else g for o,g in zip((logits,z), torch.autograd.grad(total, (logits,z), allow_unused=True))]

seeds = st.integers(0, 10_000)

@pytest.mark.parametrize('name', LOSSES)
@given(seed=seeds, other=st.floats(-1e6, 1e6)|st.just(math.nan))
@settings(max_examples=15, deadline=None)
def test_what_is_masked_changes_nothing(name, seed, other):
    logits, z, labels, mask, places = batch(seed)
    a = gradients(name, logits, z, labels, mask, places)
    b = gradients(name, torch.where(mask, logits, torch.tensor(other)), z, torch.where(mask, labels, torch.tensor(other)), mask, places)
    for x,y in zip(a, b): assert torch.equal(x, y)
    assert not a[1][~mask].any()

@pytest.mark.parametrize('name', LOSSES)
@given(seed=seeds)
@settings(max_examples=10, deadline=None)
def test_order_of_the_chips_changes_nothing(name, seed):
    logits, z, labels, mask, places = batch(seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    total = make_loss(name)(logits, z, labels, mask, places).total
    assert total>=0
    torch.testing.assert_close(make_loss(name)(*[o[order] for o in (logits, z, labels, mask, places)]).total, total)

@pytest.mark.parametrize('name', LOSSES)
def test_a_batch_without_labels_is_zero_with_gradient(name):
    logits, z, labels, mask, places = batch(0)
    total, *grads = gradients(name, logits, z, torch.full_like(labels, math.nan), torch.zeros_like(mask), None)
    assert total==0 and total.requires_grad and not any(g.any() for g in grads)

@pytest.mark.parametrize('fn', [bce_loss, lambda *a: bce_loss(*a, torch.rand(4,dtype=torch.float64), torch.rand(4,dtype=torch.float64)), asymmetric_loss,
                                lambda *a: asymmetric_loss(*a, gamma_pos=1.5, gamma_neg=.5, clip=0.), lambda *a: asymmetric_loss(*a, gamma_pos=0., gamma_neg=0., clip=.2)])
def test_gradients_of_the_classification_losses(fn):
    for seed in range(3):
        logits, _, labels, mask, _ = batch(seed, dtype=torch.float64)
        torch.manual_seed(seed)
        w = torch.random.get_rng_state()
        def same(x):
            torch.random.set_rng_state(w)
            return fn(x, labels, mask)
        assert torch.autograd.gradcheck(same, logits.requires_grad_())

@pytest.mark.parametrize('temperature', [.1, 1.])
def test_gradients_of_the_contrastive_loss(temperature):
    for seed in range(3):
        _, z, labels, mask, places = batch(seed, dtype=torch.float64)
        for p in (None, places): assert torch.autograd.gradcheck(lambda e: contrastive_loss(F.normalize(e, dim=1), labels, mask, p, temperature), z.requires_grad_(), atol=1e-5)

def test_cross_entropy_is_that_of_torch_and_of_sklearn():
    logits, _, labels, mask, _ = batch(1, n=50)
    w, q = torch.rand(4), torch.rand(4)*3
    want = F.binary_cross_entropy_with_logits(logits, labels, w, pos_weight=q, reduction='none')[mask].mean()
    torch.testing.assert_close(bce_loss(logits, labels, mask, w, q), want)
    assert bce_loss(logits, labels).item()==pytest.approx(np.mean([log_loss(labels[:,k], torch.sigmoid(logits[:,k].double())) for k in range(4)]), rel=1e-5)

@pytest.mark.parametrize('gamma', [0., 1., 2., 3.5])
def test_asymmetric_loss_with_equal_gammas_is_the_focal_loss(gamma):
    logits, _, labels, _, _ = batch(2, n=40)
    torch.testing.assert_close(asymmetric_loss(logits, labels, None, gamma, gamma, 0.), sigmoid_focal_loss(logits, labels, alpha=-1, gamma=gamma, reduction='mean'))

def test_asymmetric_loss_by_the_papers_formula():
    logits, _, labels, mask, _ = batch(3, n=40)
    p = torch.sigmoid(logits.double()).numpy()
    pm, y = np.clip(p-.05, 0, None), labels.numpy()
    cells = -(y*(1-p)**1*np.log(p) + (1-y)*pm**4*np.log(1-pm))
    assert asymmetric_loss(logits, labels, mask, gamma_pos=1.).item()==pytest.approx(cells[mask.numpy()].mean(), rel=1e-5)

def reference(z, w, known, same, t):
    "The contrastive loss in numpy, chip by chip"
    total, n = [], len(z)
    for i in range(n):
        if w[i].sum()==0: continue
        e = np.exp(z[i]@z.T/t)
        terms = [w[i,j]*np.log(e[j]/sum(e[k] for k in range(n) if k!=i and (same[i,j] or known[i,k]))) for j in range(n) if w[i,j]>0]
        total.append(-sum(terms)/w[i].sum())
    return np.mean(total) if total else 0.

@given(seed=seeds, with_places=st.booleans())
@settings(max_examples=40, deadline=None)
def test_contrastive_loss_by_its_formula(seed, with_places):
    _, z, labels, mask, places = batch(seed, n=8, dtype=torch.float64)
    w, known, same = np.zeros((8,8)), np.zeros((8,8), bool), np.zeros((8,8), bool)
    for i in range(8):
        for j in range(8):
            if i==j: continue
            m = (mask[i]&mask[j]).numpy()
            a, b = labels[i].numpy()[m]>0, labels[j].numpy()[m]>0
            if (a|b).any(): w[i,j], known[i,j] = (a&b).sum()/(a|b).sum(), True
            if with_places and places[i]==places[j]: w[i,j], known[i,j], same[i,j] = 1, True, True
    assert contrastive_loss(z, labels, mask, places if with_places else None, .2).item()==pytest.approx(reference(z.numpy(), w, known, same, .2), rel=1e-6, abs=1e-9)

def test_contrastive_loss_with_one_label_is_the_published_one():
    "Khosla et al., equation 2, with every chip in exactly one class"
    g = torch.Generator().manual_seed(4)
    z, k = F.normalize(torch.randn(12, 6, generator=g), dim=1), torch.arange(12)%3
    sim = (z@z.T/.1).fill_diagonal_(-torch.inf)
    logp, positive = sim.log_softmax(1), (k[:,None]==k[None]) & ~torch.eye(12, dtype=torch.bool)
    want = torch.stack([-logp[i][positive[i]].mean() for i in range(12)]).mean()
    torch.testing.assert_close(contrastive_loss(z, F.one_hot(k).float()), want)

@given(seed=seeds)
@settings(max_examples=30, deadline=None)
def test_overlap_is_that_of_sklearn(seed):
    _, _, labels, _, _ = batch(seed, n=5, c=6)
    got = jaccard_overlap(labels)
    want = [[jaccard_score(a, b, zero_division=0) for b in labels.numpy()] for a in labels.numpy()]
    np.testing.assert_allclose(got, want, atol=1e-6)

def test_two_dates_pull_without_any_label():
    _, z, labels, mask, _ = batch(5)
    nothing = torch.zeros_like(mask)
    z = z.requires_grad_()
    loss = contrastive_loss(z, labels, nothing, torch.tensor([7,7,8,9,10,11]))
    toward, = torch.autograd.grad(loss, z)
    assert loss>0 and (toward[0]@z[1]).item()<0, 'the slope leads down towards the other date'
    assert contrastive_loss(z, labels, nothing, torch.tensor([-1,-1,-2,-2,-1,-1]))==0, 'negative numbers are no place'
    assert contrastive_loss(z, labels, nothing, torch.arange(6))==0

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('name', LOSSES)
def test_half_precision_is_computed_in_32_bits(name, dtype):
    logits, z, labels, mask, places = batch(6, n=16, d=64)
    logits = (logits*1000).to(dtype)
    want = make_loss(name)(logits.float(), z, labels, mask, places).total
    with torch.autocast('cpu', dtype=dtype): got, *grads = gradients(name, logits, z, labels, mask, places)
    torch.testing.assert_close(got, want)
    assert got.dtype==torch.float32 and all(g.isfinite().all() for g in grads)

def test_weights_of_classes():
    y, m = torch.tensor([[1.,1,0],[0,1,0],[0,1,0],[0,1,0]]), torch.ones(4,3)
    w = class_weights_of(y, m)
    assert w[0]/w[1]==2 and w[:2].mean()==1 and w[2]==1
    torch.testing.assert_close(class_weights_of(y.numpy(), m.numpy().astype(bool)), w)
    hidden = torch.tensor([[True]*3, [True]*3, [False]*3, [False]*3])
    assert class_weights_of(torch.where(hidden, y, math.nan), hidden).isfinite().all()

def test_bad_options_are_refused_before_training():
    for kw, text in [(dict(name='bec'), "did you mean 'bce'"), (dict(clip=1.), 'clip is from 0'), (dict(temperature=0), 'above 0'), (dict(contrastive_weight=-1), '0 or above')]:
        with pytest.raises(InputError, match=text): make_loss(**kw)
    with pytest.raises(InputError, match='one shape'): bce_loss(torch.zeros(2,3), torch.zeros(2,3), torch.zeros(3,2, dtype=torch.bool))

def test_a_broken_loss_names_step_and_term():
    with pytest.raises(LossError, match=r'inf at step 1,200 \(bce inf\); lower the learning rate') as e: check_loss(LossValue(torch.tensor(math.inf), dict(bce=torch.tensor(math.inf))), 1200)
    assert isinstance(e.value, ImagesimError) and isinstance(e.value, ArithmeticError)

def test_class_weights_move_with_the_module_and_stay_out_of_its_state():
    loss = make_loss('bce', class_weights=[1.,2.])
    assert not loss.state_dict() and loss.to(torch.float64).class_weights.dtype==torch.float64

def test_losses_compile_without_a_break_in_the_graph():
    args = batch(7)
    for name in LOSSES:
        loss = make_loss(name)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(lambda *a: loss(*a).total, backend='eager', fullgraph=True)(*args), loss(*args).total)
