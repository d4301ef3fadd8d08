"""What augmentation must never do: leave the range, lose exactness or a draw, colour a grey chip, look at its neighbours."""
import numpy as np, pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from imagesim.augment import Augment, dihedral, eval_views, is_grey, resample, resample_weights, sample, source_positions, step_generator, throw_dice
from imagesim.infra import InputError

OFF = dict(brightness=0, contrast=0, saturation=0, gain=0, grey=0, haze=0)

def chips(n=4, h=24, w=None, seed=0):
    return torch.randint(0, 256, (n,3,h,w or h), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))

few = settings(max_examples=30, deadline=None)
seeds, kinds = st.integers(0, 2**40), st.sampled_from(['uint8','float32','float16'])

def as_kind(x, kind): return x if kind=='uint8' else (x/255).to(getattr(torch, kind))

@few
@given(seeds, st.floats(0,2), kinds, st.integers(1,5), st.integers(3,40), st.integers(3,40), st.sampled_from([None,1,7,32]))
def test_range_shape_and_type(seed, strength, kind, n, h, w, size):
    y = Augment(strength, size, haze=.6, grey=.4)(as_kind(chips(n,h,w,seed), kind), step_generator(seed))
    assert y.dtype==torch.float32 and y.shape==(n,3,size or h,size or w)
    assert 0<=y.min() and y.max()<=1 # false for NaN too

@few
@given(seeds, kinds, st.integers(3,40), st.integers(3,40))
def test_strength_0_and_eval_mode_change_nothing(seed, kind, h, w):
    x = as_kind(chips(3,h,w,seed), kind)
    want = x.float()/(255 if kind=='uint8' else 1)
    before = x.clone()
    assert torch.equal(Augment(0)(x, step_generator(seed)), want)
    assert torch.equal(Augment().eval()(x), want)
    Augment(2, haze=.9)(x, step_generator(seed))
    assert torch.equal(x, before), 'the input was changed'

@few
@given(seeds, st.integers(2,33))
def test_turns_are_exact(seed, side):
    x = chips(6, side, seed=seed)
    for low in (1, .5): # the second looks pixels up, in windows as large as the picture
        a = Augment(scale=(low,1), **OFF)
        dice = throw_dice(6, step_generator(seed))
        dice['side'] = torch.ones_like(dice['side'])
        y = a(x, dice=dice)
        same = torch.equal if low==1 else lambda a,b: torch.allclose(a, b, atol=1e-4)
        for i in range(6): assert any(same(y[i], v) for v in eval_views(x[i:i+1]/255)[:,0])

def test_all_eight_poses_come_up_equally_often():
    x = torch.arange(27.).reshape(1,3,3,3)/27
    y = Augment(scale=(1,1), **OFF)(x.expand(4000,-1,-1,-1), step_generator(0))
    views = eval_views(x)[:,0]
    count = [(y==v).flatten(1).all(1).sum().item() for v in views]
    assert sum(count)==4000 and min(count)>400

def test_pictures_that_are_no_squares_keep_their_shape_and_are_never_turned():
    x = chips(64, 10, 20)/255
    y = Augment(scale=(1,1), **OFF)(x, step_generator(0))
    for i in range(64): assert any(torch.equal(y[i], v) for v in (x[i], x[i].flip(-1), x[i].flip(-2), x[i].flip(-1,-2)))

def test_flips_and_turns_can_be_left_out():
    x = chips(32)/255
    assert torch.equal(Augment(flips=False, turns=False, scale=(1,1), **OFF)(x), x)
    y = Augment(flips=False, scale=(1,1), **OFF)(x, step_generator(0))
    assert all(torch.equal(a,b) or torch.equal(a,b.mT) for a,b in zip(y,x)) and not torch.equal(y,x)

@few
@given(seeds, kinds)
def test_a_picture_without_colour_gets_none(seed, kind):
    x = as_kind(chips(4, 20, seed=seed)[:,:1].expand(-1,3,-1,-1), kind)
    y = Augment(2, haze=.49, grey=.2)(x, step_generator(seed))
    assert torch.equal(y[:,0], y[:,1]) and torch.equal(y[:,1], y[:,2])

@few
@given(seeds)
def test_grey_takes_all_colour(seed):
    y = Augment(2, grey=.5, haze=.5)(chips(4, 20, seed=seed), step_generator(seed)) # at strength 2: always
    assert is_grey(y).all() and torch.equal(y[:,0], y[:,2])

def test_draws_are_of_the_generator_alone():
    x, a = chips(8), Augment(haze=.5)
    assert torch.equal(a(x, step_generator(3,1,4)), a(x, step_generator(3,1,4)))
    assert not torch.equal(a(x, step_generator(3,1,4)), a(x, step_generator(3,1,5)))
    torch.manual_seed(0); state = torch.get_rng_state()
    a(x, step_generator(3))
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator was used"
    torch.manual_seed(1); one = a(x); torch.manual_seed(1)
    assert torch.equal(a(x), one)

def test_a_draw_does_not_depend_on_settings_batch_or_type():
    x = chips(8)
    a, b = Augment(scale=(1,1), **OFF), Augment(scale=(1,1), **{**OFF, 'brightness':.001})
    assert (a(x, step_generator(0))-b(x, step_generator(0))).abs().max()<.002
    dice = throw_dice(8, step_generator(9))
    full = Augment(haze=.5)
    alone = torch.cat([full(x[i:i+1], dice={k:v[i:i+1] for k,v in dice.items()}) for i in range(8)])
    assert torch.allclose(full(x, dice=dice), alone, atol=1e-5) # each chip for itself
    assert torch.allclose(full(x, dice=dice), full(x/255, dice=dice), atol=1e-5)

def test_chips_of_a_batch_are_drawn_apart():
    y = Augment()(chips(1).expand(16,-1,-1,-1), step_generator(0))
    assert len({v.numpy().tobytes() for v in y})==16

def test_step_generators_differ():
    first = {throw_dice(1, step_generator(s, e, b, r))['gain'][0,0].item() for s in range(3) for e in range(3) for b in range(3) for r in range(3)}
    assert len(first)==81

@few
@given(st.integers(2,40), st.integers(1,40), st.integers(2,40), st.integers(2,40)) # torch's own is wrong for results one pixel wide: every row is the first one
def test_resampling_a_whole_picture_equals_interpolate(h, h2, w, w2):
    x = chips(2, h, w)/255
    full = lambda v: torch.full((2,), float(v))
    y = resample(x, resample_weights(full(0), full(h), h, h2), resample_weights(full(0), full(w), w, w2))
    assert torch.allclose(y, F.interpolate(x, (h2,w2), mode='bilinear', antialias=True), atol=1e-4)

def test_a_crop_shows_the_window_it_should():
    x = torch.zeros(1,1,10,10); x[:,:,2:6,3:7] = 1
    four = torch.tensor([4.])
    assert torch.equal(resample(x, resample_weights(torch.tensor([2.]), four, 10, 8), resample_weights(torch.tensor([3.]), four, 10, 8))[0,0,1:-1,1:-1], torch.ones(6,6))

@few
@given(seeds, st.floats(.1,1), st.integers(2,30), st.integers(0,20), st.booleans())
def test_looking_up_equals_the_matrices_where_pictures_grow(seed, share, h, more, mirrored):
    x, length = chips(2, h, seed=seed)/255, torch.tensor([h*share]*2)
    at, m = (h-length)*torch.tensor([.2,1.]), torch.tensor([mirrored, False])
    a = sample(x, source_positions(at, length, h+more, m), source_positions(at, length, h+more))
    assert torch.allclose(a, resample(x, resample_weights(at, length, h, h+more, m), resample_weights(at, length, h, h+more)), atol=1e-4)

@few
@given(seeds, st.floats(.3,1))
def test_windows_stay_inside(seed, low):
    "A picture with one value has it everywhere, up to its edges: nothing is brought in from beyond"
    y = Augment(scale=(low,1), **OFF)(torch.full((4,3,17,17), .5), step_generator(seed))
    assert torch.allclose(y, torch.full_like(y, .5), atol=1e-6)

def test_eight_views_and_their_average():
    x = chips(2, 8)/255
    mean = (eval_views(x).flatten(0,1).flatten(1)@torch.ones(192)).unflatten(0,(8,-1)).mean(0)
    assert torch.allclose(mean, x.flatten(1).sum(1), rtol=1e-5)
    assert torch.equal(dihedral(x, 6), torch.rot90(x, 1, (-2,-1))) or torch.equal(dihedral(x, 6), torch.rot90(x, -1, (-2,-1)))
    with pytest.raises(InputError, match='there are eight'): dihedral(x, 8)

def test_autocast_does_not_reach_it():
    x, a = chips(4), Augment()
    plain = a(x, step_generator(0))
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(a(x, step_generator(0)), plain)

def test_an_empty_batch_is_a_batch(): assert Augment(size=16)(chips(0)).shape==(0,3,16,16)

def test_it_has_no_state_and_keeps_no_graph():
    a = Augment()
    assert not a.state_dict() and Augment(**a.settings).settings==a.settings
    assert not a(torch.rand(2,3,8,8, requires_grad=True)).requires_grad

@pytest.mark.parametrize('kw,say', [(dict(strength=-1),'strength'), (dict(strength=3),'strength'), (dict(size=0),'size'), (dict(size=2.5),'size'), (dict(scale=(0,1)),'scale'), (dict(scale=(1,.5)),'scale'),
    (dict(scale=(.5,1.2)),'scale'), (dict(gain=1),'gain'), (dict(haze=-.1),'haze'), (dict(brightness=float('nan')),'brightness')])
def test_settings_that_can_not_be_meant(kw, say):
    with pytest.raises(InputError, match=say): Augment(**kw)

@pytest.mark.parametrize('x', [torch.zeros(3,8,8), torch.zeros(1,1,8,8), torch.zeros(1,3,8,8,dtype=torch.int64)])
def test_what_is_no_batch_of_pictures(x):
    with pytest.raises(InputError): Augment()(x)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here')
def test_a_gpu_draws_and_yields_the_same():
    x, a = chips(16, 64), Augment(haze=.5)
    on = a(x.cuda(), step_generator(0))
    assert on.is_cuda and (on.cpu()-a(x, step_generator(0))).abs().max()<5e-3 # matrix products may be rounded to TF32
    with pytest.raises(InputError, match='of the CPU'): a(x, torch.Generator('cuda'))
