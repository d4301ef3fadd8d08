"""The network: its parts against torchvision, hostile and foreign weights, freezing, rebuilding from a file, maps on the right spot"""
import math, os, pickle, warnings

import lightning as L, numpy as np, orjson, pytest, torch, torchvision
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from imagesim import model as M
from imagesim.infra import CorruptError, ImagesimError, InputError, MissingError, StorageError
from imagesim.loader import Sample
from imagesim.loss import LossError
from imagesim.model import (BACKBONES, ConvHead, MultilabelResnetFC, SkywayDataset, create_head, draw_where, embedding_sizes, folded_norms, freeze_pretrained, layer_groups, load_model,
    lr_factor, optimizer_groups, pool_odds, read_weights, save_model, settle_norms, unfreeze_pretrained, where)

CLASSES = ['field', 'houses', 'road']

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    "Networks as small as these are slower on several threads"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def make(**kw): return MultilabelResnetFC(**{**dict(classes=CLASSES, backbone='tinynet', weights='checkpoint', size=64), **kw})

def pictures(n=4, size=64, seed=0): return torch.randint(0, 256, (n,3,size,size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))

def samples(n=16, seed=0, masked=.3):
    g = torch.Generator().manual_seed(seed)
    x, y, m = pictures(n, seed=seed), (torch.rand(n,3,generator=g)<.4).float(), torch.rand(n,3,generator=g)>=masked
    return [Sample(x[i], y[i], m[i], i//2, i) for i in range(n)]

def trainer(root=None, **kw):
    return L.Trainer(**{**dict(max_epochs=1, accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False), **kw})

# --- parts

@pytest.mark.parametrize('activation', [nn.ReLU, nn.GELU])
@pytest.mark.parametrize('dropout', [0, .3])
def test_head_has_the_users_shape(activation, dropout):
    head = create_head(2048, 13, dropout, activation)
    assert [(m.in_features, m.out_features) for m in head if isinstance(m, nn.Linear)]==[(2048,1024), (1024,512), (512,13)]
    assert isinstance(head[-1], nn.Linear) and sum(isinstance(m, activation) for m in head)==2 and sum(isinstance(m, nn.Dropout) for m in head)==2*bool(dropout)

def test_pooling_lies_between_mean_and_maximum_and_stays_finite():
    x = torch.randn(5, 3, 7, 7)*10
    p = pool_odds(x)
    assert (p>=x.mean((2,3))-1e-4).all() and (p<=x.amax((2,3))+1e-4).all()
    torch.testing.assert_close(p.exp(), x.double().exp().mean((2,3)).float(), rtol=1e-4, atol=1e-6)
    assert pool_odds(torch.full((1,1,2,2), 6e4, dtype=torch.float16)).isfinite().all()

@pytest.mark.parametrize('name', ['resnet18', 'mobilenet_v2', 'squeezenet1_0'])
def test_backbone_computes_what_torchvision_does(name):
    net = torchvision.models.get_model(name).eval()
    body = M._Body(name).eval()
    M._put(body, net.state_dict(), 'x', BACKBONES[name].extra)
    x = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        if name=='resnet18': want = net.layer4(net.layer3(net.layer2(net.layer1(net.maxpool(F.relu(net.bn1(net.conv1(x))))))))
        else: want = net.features(x)
        torch.testing.assert_close(body(x)[1], want)

@pytest.mark.parametrize('name', BACKBONES)
def test_sizes_are_known_before_running(name):
    with torch.device('meta'): body = M._Body(name)
    third, last = body(torch.zeros(1, 3, 224, 224, device='meta'))
    assert third.shape[1]==BACKBONES[name].sizes['layer3'] and last.shape[1]==BACKBONES[name].sizes['features']
    assert list(body.groups)==['stem', 'layer1', 'layer2', 'layer3', 'layer4']
    named = {id(p) for names in body.groups.values() for n in names for p in body.get_submodule(n).parameters()}
    assert named=={id(p) for p in body.parameters()}, 'every weight is in a group'

@pytest.mark.parametrize('name', ['resnet18', 'mobilenet_v2', 'squeezenet1_0', 'tinynet'])
def test_cells_lie_where_the_map_says(name):
    "The pixels that a cell answers to, weighed by how much, are centred on offset + stride * cell"
    torch.manual_seed(0)
    for padding in ['torch'] + ['tensorflow']*(name=='mobilenet_v2'):
        model = make(backbone=name, padding=padding).eval()
        for m in list(model.modules()): # every path counts alike, so that the answer is the geometry alone
            if isinstance(m, nn.Conv2d): m.weight.data.abs_().div_(m.weight[0].numel()*m.weight.data.abs().mean())
            for k,c in m.named_children():
                if isinstance(c, nn.ReLU6): setattr(m, k, nn.Identity()) # above 6 it would answer to nothing
                if isinstance(c, nn.MaxPool2d): setattr(m, k, nn.AvgPool2d(c.kernel_size, c.stride, c.padding, c.ceil_mode)) # one pixel of several would win
        x = torch.rand(1, 3, 352, 352, requires_grad=True)
        last = model.backbone(x)[1]
        i, j = last.shape[2]//2, last.shape[3]//2-1
        pull, = torch.autograd.grad(last[0,:,i,j].sum(), x)
        weight = pull[0].abs().sum(0)
        at = (weight*torch.arange(352.)[:,None]).sum()/weight.sum(), (weight*torch.arange(352.)).sum()/weight.sum()
        stride, first = BACKBONES[name].stride, M._first_cell(model)
        assert at[0].item()==pytest.approx(first+stride*i, abs=1.5) and at[1].item()==pytest.approx(first+stride*j, abs=1.5)

# --- weights

def test_hostile_weights_run_nothing(tmp_path):
    class Trap:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'ran'),)
    torch.save({'state_dict':{'a':torch.zeros(1)}, 'x':Trap()}, tmp_path/'zip.pth')
    torch.save({'x':Trap()}, tmp_path/'old.pth', _use_new_zipfile_serialization=False)
    (tmp_path/'raw.pt').write_bytes(pickle.dumps(Trap()))
    (tmp_path/'run.ckpt').write_bytes((tmp_path/'zip.pth').read_bytes())
    for name in ('zip.pth', 'old.pth', 'raw.pt', 'run.ckpt'):
        with pytest.raises(ImagesimError) as e: read_weights(tmp_path/name)
        assert name in str(e.value)
    with pytest.raises(InputError, match='save its state_dict'): read_weights(tmp_path/'zip.pth')
    with pytest.raises(InputError, match='refused'): load_model(tmp_path/'run.ckpt')
    assert not (tmp_path/'ran').exists()

@pytest.mark.parametrize('suffix', ['.safetensors', '.pth', '.pt', '.ckpt'])
def test_damaged_weights_are_one_line(tmp_path, suffix):
    good = tmp_path/f'good{suffix}'
    state = {'a':torch.arange(3000.)}
    save_file(state, good) if suffix=='.safetensors' else torch.save(state, good)
    assert torch.equal(read_weights(good)['a'], state['a'])
    data = good.read_bytes()
    for bad in (b'', b'x', data[:100], data[:-200], b'\0'*200, data[:40]+b'\xff'*40+data[80:]):
        path = tmp_path/f'bad{suffix}'
        path.write_bytes(bad)
        try: read_weights(path)
        except ImagesimError as e: assert '\n' not in str(e) and 'bad' in str(e)

def test_weights_from_a_bucket(bucket):
    m = make()
    save_model(m, f'{bucket}/models/m.safetensors')
    assert torch.equal(load_model(f'{bucket}/models/m.safetensors').head[0].weight, m.head[0].weight)
    with pytest.raises(MissingError): load_model(f'{bucket}/models/n.safetensors')

def test_imagenet_without_network_names_the_fix(tmp_path, monkeypatch):
    for k in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'): monkeypatch.setenv(k, 'http://127.0.0.1:9')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    for k in ('no_proxy', 'NO_PROXY'): monkeypatch.delenv(k, raising=False)
    with pytest.raises(StorageError, match=r"weights='resnet18.safetensors'"): make(backbone='resnet18', weights='imagenet')

def test_random_weights_are_said_loudly():
    with pytest.warns(UserWarning, match='RANDOM'): m = make(weights=None)
    assert m.hparams.pretrained is None and m.hparams.backbone_lr_scale==1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        make()

def test_weights_that_do_not_fit_name_what_is_missing(tmp_path):
    state = {k:torch.rand_like(v) if v.is_floating_point() else v for k,v in torchvision.models.mobilenet_v2().state_dict().items()}
    save_file(state, tmp_path/'m2.safetensors')
    m = make(backbone='mobilenet_v2', weights=tmp_path/'m2.safetensors')
    assert torch.equal(m.backbone.features[17].conv[0][0].weight, state['features.17.conv.0.0.weight']) and m.hparams.pretrained=='m2.safetensors' and m.hparams.backbone_lr_scale==.1
    with pytest.raises(InputError, match=r"missing.*They fit backbone='mobilenet_v2'"): make(backbone='tinynet', weights=tmp_path/'m2.safetensors')
    torch.save({'state_dict':{f'module.{k}':v for k,v in state.items() if k!='features.1.conv.1.weight'}}, tmp_path/'less.pth')
    with pytest.raises(InputError, match=r'1 of \d+ missing \(features.1.conv.1.weight\)$'): make(backbone='mobilenet_v2', weights=tmp_path/'less.pth')
    save_file({**state, 'features.0.0.weight':torch.zeros(32,1,3,3), 'odd':torch.zeros(1)}, tmp_path/'odd.safetensors')
    with pytest.raises(InputError, match=r'1 unknown \(odd\); 1 of another shape \(features.0.0.weight is \(32, 1, 3, 3\), should be \(32, 3, 3, 3\)\)'): make(backbone='mobilenet_v2', weights=tmp_path/'odd.safetensors')

def test_real_weights(shared):
    for name in ('mobilenet_v2', 'squeezenet1_0'):
        path = shared/f'weights/{name}-imagenet.safetensors'
        with warnings.catch_warnings(record=True, action='always') as said: m = make(backbone=name, weights=path)
        assert any('FOLDED' in str(w.message) for w in said)==folded_norms(m)==(name=='mobilenet_v2')
        assert torch.equal(m.backbone.features[0].weight if name=='squeezenet1_0' else m.backbone.features[0][0].weight, load_file(path)['features.0.weight' if name=='squeezenet1_0' else 'features.0.0.weight'])

def test_tensorflow_padding_keeps_names_and_shapes():
    a, b = make(backbone='mobilenet_v2').eval(), make(backbone='mobilenet_v2', padding='tensorflow').eval()
    b.load_state_dict(a.state_dict())
    for size in (64, 97, 130):
        x = torch.rand(1, 3, size, size)
        with torch.inference_mode(): assert a.backbone(x)[1].shape==b.backbone(x)[1].shape
    assert sum(isinstance(m, M._SameConv2d) for m in b.modules())==5
    conv = M._SameConv2d(2, 3, 3, stride=2)
    x = torch.rand(1, 2, 8, 8)
    torch.testing.assert_close(conv(x), F.conv2d(F.pad(x, (0,1,0,1)), conv.weight, conv.bias, stride=2))
    with pytest.raises(InputError, match='for mobilenet_v2'): make(padding='tensorflow')

@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
@pytest.mark.parametrize('size', [(8,8), (12,6), (8,7), (9,8)])
def test_the_short_cut_of_tensorflow_padding_is_exact(size, dtype, monkeypatch):
    "Value and gradients, against padding by hand; bfloat16 to its own rounding"
    conv = M._SameConv2d(5, 5, 3, stride=2, groups=5).to(dtype)
    x = torch.randn(2, 5, *size, dtype=dtype)
    assert conv._by_halves(x)==(dtype==torch.bfloat16 and size in ((8,8), (12,6)))
    with torch.no_grad(): assert not conv._by_halves(x)
    if dtype==torch.float64 and not (size[0]%2 or size[1]%2): monkeypatch.setattr(M._SameConv2d, '_by_halves', lambda self, x: True)
    def run(fn):
        a = x.clone().requires_grad_()
        y = fn(a)
        return y, *torch.autograd.grad(y.square().sum(), (a, conv.weight, conv.bias))
    pads = [n%2 for n in size]
    by_hand = lambda a: F.conv2d(F.pad(a, (pads[1],1,pads[0],1)), conv.weight, conv.bias, 2, groups=5)
    for got,want in zip(run(conv), run(by_hand)): torch.testing.assert_close(got, want, **(dict(rtol=.05, atol=.1) if dtype==torch.bfloat16 else {}))

def test_the_short_cut_is_taken_in_training_only():
    m, x = make(backbone='mobilenet_v2', padding='tensorflow', head='linear'), pictures(2)
    taken, was = [], M._SameConv2d._by_halves
    with pytest.MonkeyPatch.context() as p:
        p.setattr(M._SameConv2d, '_by_halves', lambda self, x: taken.append(was(self, x)) or taken[-1])
        with torch.autocast('cpu', torch.bfloat16): m(x)
        assert taken==[False]+[True]*4, 'the first one is no depthwise convolution'
        taken.clear()
        m(x)
        with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16): m.eval()(x)
        assert not any(taken) and len(taken)==10

# --- folded batch norms

def told(net, seed=0):
    "Give the batch norms statistics, weights and biases as training leaves them"
    torch.manual_seed(seed)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for m in norms:
            m.momentum = None # the plain average
            m.weight.uniform_(.5, 1.5); m.bias.normal_(0, .3)
        net.train()
        for k in range(2): net(torch.rand(16, 3, 64, 64)*4-2)
    for m in norms: m.momentum = .1
    return net.eval()

@torch.no_grad()
def fold(net):
    "Multiply each batch norm into the convolution before it"
    for m in net.modules():
        if isinstance(m, nn.Conv2d): conv = m
        if isinstance(m, nn.BatchNorm2d):
            slope = m.weight/(m.running_var+m.eps).sqrt()
            conv.weight *= slope.view(-1,1,1,1); m.bias -= slope*m.running_mean
            m.weight.fill_(math.sqrt(1+m.eps)); m.running_mean.zero_(); m.running_var.fill_(1)
    return net

@pytest.fixture
def folded(tmp_path):
    "A model from a file with folded norms"
    save_file(fold(told(M._Body('tinynet'))).state_dict(), tmp_path/'folded.safetensors')
    with pytest.warns(UserWarning, match=r'FOLDED.*settle_norms\(model, pictures\)'): return make(weights=tmp_path/'folded.safetensors', dropout_prob=0).eval()

def alike(a, b): return F.cosine_similarity(a-b.mean(0), b-b.mean(0)).mean().item() # without what all pictures share

def both_modes(m, x):
    "The features in evaluation mode and with the backbone in training mode"
    with torch.no_grad():
        a = m.eval().features(x)['features']
        m.backbone.train()
        for n in m.backbone.modules(): n.momentum = 0. # and leave the running means alone
        b = m.features(x)['features']
    m.eval()
    return a, b

def test_settled_norms_agree_in_both_modes(folded):
    x = pictures(24, seed=3)
    a, b = both_modes(folded, x)
    assert folded_norms(folded) and alike(b, a)<.9 and (b-a).abs().max()>.2*a.abs().max(), 'as it comes, training mode computes something else'
    assert settle_norms(folded, x) is folded and not folded_norms(folded)
    c, d = both_modes(folded, x)
    torch.testing.assert_close(c, a, rtol=1e-3, atol=1e-4*a.abs().max().item())
    torch.testing.assert_close(d, c, rtol=1e-3, atol=1e-4*a.abs().max().item())
    e, f = both_modes(folded, pictures(24, seed=4))
    assert alike(f, e)>.9, 'on other pictures as well'

def test_settling_takes_batches_samples_and_one_tensor_alike(folded):
    x = pictures(20, seed=5)
    state, out = folded.state_dict(), []
    for images in (x, x.split(7), (x/255).split(9), DataLoader([*samples(20, seed=5), *[s._replace(image=torch.full_like(s.image, 255), row=-1-s.row) for s in samples(4)]], 6)):
        m = make(dropout_prob=0)
        m.load_state_dict(state)
        out.append(settle_norms(m.train(), images, batch_size=6).state_dict())
        assert m.training
    for o in out[1:]:
        for k in o: torch.testing.assert_close(o[k], out[0][k], rtol=1e-4, atol=1e-5)
    m = make(dropout_prob=0)
    m.load_state_dict(out[0])
    for k,v in settle_norms(m, x).state_dict().items(): torch.testing.assert_close(v, out[0][k], rtol=1e-4, atol=1e-5) # a second time changes nothing

def test_dead_channels_are_settled_safely(folded):
    with torch.no_grad():
        folded.backbone.stem[0].weight[:5] = 0 # variance 0
        folded.backbone.layer2.bn1.weight[:5] = 0 # answers to nothing
    x = pictures(16, seed=6)
    a, _ = both_modes(folded, x)
    settle_norms(folded, x)
    assert all(v.isfinite().all() for v in folded.state_dict().values()) and (folded.backbone.stem[1].running_var[:5]==0).all()
    c, d = both_modes(folded, x)
    torch.testing.assert_close(c, a, rtol=1e-3, atol=1e-4*a.abs().max().item()); torch.testing.assert_close(d, c, rtol=1e-3, atol=1e-4*a.abs().max().item())
    folded.train().batch_loss(next(iter(DataLoader(samples(), 16))))[0].total.backward()
    assert all(p.grad.isfinite().all() for p in folded.parameters() if p.grad is not None)

def test_settling_leaves_head_and_modes_alone_and_refuses_what_is_broken(folded):
    freeze_pretrained(folded, 'stem').train()
    before, modes = {k:v.clone() for k,v in folded.state_dict().items()}, [m.training for m in folded.modules()]
    for images, text in (([], 'no pictures'), (torch.full((4,3,64,64), math.nan), 'not finite'), (DataLoader([s._replace(row=-1) for s in samples(4)], 2), 'no pictures')):
        with pytest.raises(InputError, match=text): settle_norms(folded, images)
    assert all(torch.equal(v, before[k]) for k,v in folded.state_dict().items())
    settle_norms(folded, pictures(8))
    assert [m.training for m in folded.modules()]==modes and all(torch.equal(v, before[k]) for k,v in folded.state_dict().items() if k.startswith('head'))
    assert not any(m._forward_pre_hooks for m in folded.modules())
    plain = fold(told(torchvision.models.squeezenet1_0()))
    assert not folded_norms(plain) and settle_norms(plain, torch.rand(2,3,64,64)) is plain, 'without norms there is nothing to do'

def test_what_is_not_folded_is_loaded_quietly(tmp_path):
    net = told(M._Body('tinynet'))
    save_file(net.state_dict(), tmp_path/'a.safetensors')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert not folded_norms(make(weights=tmp_path/'a.safetensors'))

# --- the module

@pytest.mark.parametrize('backbone,head', [('tinynet','fc'), ('tinynet','conv'), ('tinynet','linear'), ('squeezenet1_0','conv')])
def test_every_embedding_has_its_size_and_length_one(backbone, head):
    for e,n in embedding_sizes(backbone, head, 32).items():
        m = make(backbone=backbone, head=head, embedding=e, projection=32, loss='bce+contrastive').eval()
        with torch.inference_mode():
            z, logits = m.embed_and_score(pictures())
            assert z.shape==(4,n) and m.embedding_size==n and z.dtype==torch.float32 and logits.shape==(4,3)
            torch.testing.assert_close(z.norm(dim=1), torch.ones(4))
            torch.testing.assert_close(m(pictures()), logits); torch.testing.assert_close(m.embed(pictures()), z)

def test_bytes_floats_layouts_and_half_precision_agree():
    m = make().eval()
    x = pictures()
    with torch.inference_mode():
        z, logits = m.embed_and_score(x)
        for y in (x/255, x.to(memory_format=torch.channels_last), (x/255).double()): torch.testing.assert_close(m.embed(y.float() if y.is_floating_point() else y), z, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(m.to(memory_format=torch.channels_last).embed(x), z, rtol=1e-4, atol=1e-5)
        with torch.autocast('cpu', dtype=torch.bfloat16): half, l = m.embed_and_score(x)
    assert half.dtype==torch.float32 and (half*z).sum(1).min()>.99

@pytest.mark.parametrize('head', ['fc', 'conv'])
def test_compiles_without_a_break_in_the_graph(head):
    m = make(head=head).eval()
    for k in ('layer1','layer2','layer3'): setattr(m.backbone, k, nn.Identity()) # plain modules of torch, and slow to trace
    m.backbone.layer4 = nn.Conv2d(24, 128, 1, 8)
    torch._dynamo.reset()
    with torch.no_grad(): torch.testing.assert_close(torch.compile(m.embed_and_score, backend='eager', fullgraph=True)(pictures()), m.embed_and_score(pictures()))
    conv, x = M._SameConv2d(3, 4, 3, stride=2), torch.rand(1, 3, 9, 8)
    torch.testing.assert_close(torch.compile(conv, backend='eager', fullgraph=True)(x), conv(x))
    conv, x = M._SameConv2d(4, 4, 3, stride=2, groups=4), torch.rand(1, 4, 8, 8)
    with torch.autocast('cpu', torch.bfloat16): torch.testing.assert_close(torch.compile(conv, backend='eager', fullgraph=True)(x), conv(x))

@pytest.mark.parametrize('x,text', [(torch.zeros(3,64,64), r'x\[None\]'), (torch.zeros(2,1,64,64), 'repeated three times'), (torch.zeros(2,3,64,64,dtype=torch.int64), 'torch.int64'),
                                    (torch.zeros(2,3,31,64), '64 x 31'), (torch.zeros(2,64,64,3), r'\(2, 64, 64, 3\)')])
def test_wrong_pictures_are_refused(x, text):
    with pytest.raises(InputError, match=text): make()(x)

@pytest.mark.parametrize('kw,text', [(dict(classes=[]), 'at least one'), (dict(backbone='resnet-50'), 'did you mean'), (dict(head='fcc'), "'fc'"), (dict(embedding='feature'), "did you mean 'features'"),
                                     (dict(loss='bce+contrstive'), 'did you mean'), (dict(optimizer='adam'), 'adamw'), (dict(projection=64), 'stay random'), (dict(loss_options=dict(temperature=0)), 'above 0')])
def test_wrong_options_are_refused(kw, text):
    with pytest.raises(InputError, match=text): make(**kw)

def test_hparams_are_plain_and_rebuild_the_model(tmp_path):
    m = make(head='conv', loss='asymmetric+contrastive', embedding='hidden', loss_options=dict(class_weights=torch.tensor([1.,2,3])), schema=dict(name='s', hash='abc'), dropout_prob=.1)
    config = orjson.loads(orjson.dumps(dict(m.hparams)))
    assert config==dict(m.hparams) and config['weights']=='checkpoint'
    again = MultilabelResnetFC(**config)
    again.load_state_dict(m.state_dict())
    assert dict(again.hparams)==dict(m.hparams) and torch.equal(again.loss.class_weights, torch.tensor([1.,2,3]))
    save_model(m, tmp_path/'m.safetensors')
    with torch.inference_mode(): assert torch.equal(load_model(tmp_path/'m.safetensors', CLASSES).embed(pictures()), m.eval().embed(pictures()))

def test_lightning_checkpoint_rebuilds_without_pickle_and_guards_the_classes(tmp_path):
    m, t = make(loss='bce+contrastive', schema=dict(name='s', hash='abc')), trainer()
    data = DataLoader(samples(), 8)
    t.fit(m, data)
    t.save_checkpoint(tmp_path/'a.ckpt')
    torch.load(tmp_path/'a.ckpt', weights_only=True)
    for again in (load_model(tmp_path/'a.ckpt', CLASSES, dict(name='s', hash='abc')), MultilabelResnetFC.load_from_checkpoint(tmp_path/'a.ckpt', map_location='cpu', weights_only=True).eval()):
        with torch.inference_mode(): assert torch.equal(again(pictures()), m.eval()(pictures()))
    with pytest.raises(InputError, match='it does not know water'): load_model(tmp_path/'a.ckpt', ['field','houses','water'])
    with pytest.raises(InputError, match='another order'): load_model(tmp_path/'a.ckpt', CLASSES[::-1])
    with pytest.raises(InputError, match='by other rules'): load_model(tmp_path/'a.ckpt', CLASSES, dict(name='s', hash='xyz'))
    other = make(classes=['field','houses','water'])
    with pytest.raises(InputError, match='trained for 3 classes'): trainer(max_epochs=2).fit(other, data, ckpt_path=tmp_path/'a.ckpt')
    with pytest.raises(InputError, match='another version'):
        save_file({k:v for k,v in m.state_dict().items()}, tmp_path/'b.safetensors', {'imagesim':orjson.dumps({**dict(m.hparams), 'nonsense':1}).decode()})
        load_model(tmp_path/'b.safetensors')

def test_an_earlier_run_gives_its_backbone(tmp_path):
    m = make()
    save_model(m, tmp_path/'m.safetensors')
    n = make(classes=['a','b'], weights=tmp_path/'m.safetensors', head='conv')
    assert torch.equal(n.backbone.layer4.conv2.weight, m.backbone.layer4.conv2.weight)

# --- training

def test_frozen_means_frozen():
    m = freeze_pretrained(make(weight_decay=.5, lr=.1))
    before = {k:v.clone() for k,v in m.state_dict().items()}
    trainer(max_epochs=2).fit(m, DataLoader(samples(), 8))
    after = m.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith('backbone.')), 'weights and running means'
    assert not any(torch.equal(before[k], after[k]) for k in before if k.startswith('head') and k.endswith('weight'))
    unfreeze_pretrained(m, 'layer4')
    assert m.frozen=={'stem','layer1','layer2','layer3'} and m.backbone.layer4.conv1.weight.requires_grad and not m.backbone.layer3.conv1.weight.requires_grad
    m.train()
    assert m.backbone.layer4.bn1.training and not m.backbone.layer3.bn1.training
    unfreeze_pretrained(m)
    assert all(p.requires_grad for p in m.parameters()) and not m.frozen

def test_freezing_a_plain_network():
    net = torchvision.models.resnet18()
    freeze_pretrained(net)
    net.fc = create_head(512, 13)
    assert not any(p.requires_grad for k,p in net.named_parameters() if not k.startswith('fc.')) and not net.bn1.training and net.fc.training
    assert all(p.requires_grad for p in unfreeze_pretrained(net).parameters())

@pytest.mark.parametrize('optimizer', ['adamw', 'sgd'])
def test_rates_fall_downwards_and_every_weight_has_one(optimizer):
    m = make(optimizer=optimizer, lr=1., backbone_lr_scale=.1, layer_decay=.5, weight_decay=.1, loss='bce+contrastive', projection=16)
    groups = optimizer_groups(m)
    ids = [id(p) for g in groups for p in g['params']]
    assert len(ids)==len(set(ids))==len(list(m.parameters()))
    rate = {g['name']:g['lr'] for g in groups}
    assert [rate[k] for k in ('head','layer4','layer3','layer2','layer1','stem')]==pytest.approx([1, .1, .05, .025, .0125, .00625])
    names = {id(p):k for k,p in m.named_parameters()}
    for g in groups:
        bare = {names[id(p)] for p in g['params'] if g['weight_decay']==0}
        assert all(k.endswith('bias') or m.get_parameter(k).ndim==1 for k in bare) and all(m.get_parameter(names[id(p)]).ndim>1 for p in g['params'] if g['weight_decay'])

def test_schedule_never_exceeds_the_rate():
    for total in (1, 2, 10, 1000):
        for warmup in (0, .05, .5, 3, 5000):
            f = [lr_factor(s, total, warmup, .01) for s in range(total+3)]
            assert 0<min(f) and max(f)<=1
    f = [lr_factor(s, 1000, 100, .01) for s in range(1000)]
    assert f.index(max(f))==100 and f[:101]==sorted(f[:101]) and f[100:]==sorted(f[100:], reverse=True) and f[-1]==pytest.approx(.01)

def test_a_run_follows_the_schedule_by_the_step():
    m, seen = make(optimizer='sgd', lr=.01, warmup=2, lr_floor=.1), []
    m.on_train_batch_start = lambda *a: seen.append(m.optimizers().param_groups[-1]['lr'])
    trainer(max_epochs=2).fit(m, DataLoader(samples(), 4))
    assert seen==pytest.approx([.01*lr_factor(s, 8, 2, .1) for s in range(8)])

def test_nan_stops_the_run_and_writes_no_checkpoint(tmp_path):
    m = make()
    broken = samples()
    broken[9] = broken[9]._replace(image=torch.full((3,64,64), math.nan), mask=torch.ones(3, dtype=torch.bool))
    data = [s._replace(image=s.image/255. if s.image.dtype==torch.uint8 else s.image) for s in broken]
    with pytest.raises(LossError, match='nan at step 1 .*lower the learning rate'): trainer().fit(m, DataLoader(data, 8))
    m._unchecked = M.LossValue(torch.tensor(math.nan), dict(bce=torch.tensor(math.nan))), torch.tensor(False), None, 7 # as a GPU leaves it: asked one step later
    t = trainer()
    t.strategy.connect(m)
    with pytest.raises(LossError, match='at step 7'): t.save_checkpoint(tmp_path/'x.ckpt')
    assert not (tmp_path/'x.ckpt').exists()

def test_all_unmapped_batches_and_unread_chips_go_through():
    m = make(loss='bce+contrastive')
    nothing = [s._replace(mask=torch.zeros(3, dtype=torch.bool), row=-1-i) for i,s in enumerate(samples(8))]
    batch = next(iter(DataLoader(nothing, 8)))
    assert m.batch_loss(batch)[0].total==0, 'unread chips are no partners, whatever their place'
    assert m.batch_loss(batch._replace(row=torch.arange(8)))[0].parts['contrastive']>0
    trainer().fit(m, DataLoader(nothing, 4))
    assert all(p.isfinite().all() for p in m.parameters())
    with pytest.raises(InputError, match='drop_last'): m.train().training_step(next(iter(DataLoader(nothing, 1))))

def test_masked_labels_do_not_reach_the_weights():
    def train_on(fill):
        torch.manual_seed(0)
        m = make(loss='asymmetric+contrastive', dropout_prob=0)
        data = [s._replace(label=torch.where(s.mask, s.label, torch.tensor(fill))) for s in samples()]
        trainer().fit(m, DataLoader(data, 8))
        return m.state_dict()
    a, b = train_on(0.), train_on(1.)
    assert all(torch.equal(a[k], b[k]) for k in a)

def test_validation_gathers_each_row_once_and_logs_the_scorer():
    m = make()
    data = samples(10)
    m.scorer = lambda o: dict(chips=len(o['rows']))
    t = trainer()
    t.fit(m, DataLoader(samples(), 8), DataLoader([*data, data[0], data[3]], 5))
    o = m.outputs()
    assert o['rows'].tolist()==list(range(10)) and t.callback_metrics['val_chips']==10 and {'train_loss','val_loss'}<=set(t.callback_metrics)
    with torch.inference_mode(): np.testing.assert_allclose(o['probs'], m.eval()(torch.stack([s.image for s in data])).sigmoid().numpy(), atol=1e-5)
    np.testing.assert_array_equal(o['mask'], torch.stack([s.mask for s in data]))
    z, p, rows = trainer().predict(m, DataLoader(data, 10))[0]
    assert z.shape==(10,128) and p.shape==(10,3) and rows.tolist()==list(range(10))

def test_augmentation_sees_training_batches_only():
    m, seen = make(), []
    m.augment = lambda x: seen.append(x.shape) or x.float()/255
    trainer().fit(m, DataLoader(samples(), 8), DataLoader(samples(), 8))
    assert len(seen)==2

@pytest.mark.parametrize('precision', ['bf16-mixed', '32-true'])
def test_mixed_precision_trains(precision):
    m = make(loss='asymmetric+contrastive', head='conv')
    trainer(precision=precision).fit(m, DataLoader(samples(), 8))
    assert all(p.isfinite().all() and p.dtype==torch.float32 for p in m.parameters())

def test_the_contrastive_loss_trains_what_will_be_searched():
    batch = next(iter(DataLoader(samples(), 16)))
    for kw, reached in [(dict(embedding='features'), {'backbone'}), (dict(embedding='hidden1'), {'backbone','head'}), (dict(embedding='projection'), {'backbone','project'}), (dict(embedding='features', projection=16), {'backbone','project'})]:
        m = make(loss='contrastive', dropout_prob=0, **kw)
        value, _, z = m.batch_loss(batch)
        value.total.backward()
        assert {k.split('.')[0] for k,p in m.named_parameters() if p.grad is not None and p.grad.any()}==reached
        assert z.shape[1]==(16 if kw.get('projection') else m.embedding_size)

# --- where

def squares(n, seed):
    "Noise with a bright square in one quarter, or none; the quarter's number, or -1"
    rng = np.random.default_rng(seed)
    x, q = rng.normal(90, 25, (n,3,64,64)), rng.integers(-1, 4, n)
    for i in np.flatnonzero(q>=0):
        r, c = (q[i]//2)*32+rng.integers(0, 17), (q[i]%2)*32+rng.integers(0, 17)
        x[i,:,r:r+16,c:c+16] = 220
    return torch.tensor(x.clip(0,255).astype('u1')), q

@pytest.mark.parametrize('head', ['conv', 'fc'])
def test_the_map_lies_on_the_right_spot(head):
    torch.manual_seed(0)
    x, q = squares(128, 0)
    y = torch.tensor(q>=0).float()[:,None]
    m = make(classes=['square'], head=head, weights='checkpoint', lr=.003, backbone_lr_scale=1, layer_decay=1, dropout_prob=0)
    trainer(max_epochs=4).fit(m, DataLoader([Sample(x[i], y[i], torch.ones(1, dtype=torch.bool), i, i) for i in range(128)], 16, shuffle=True))
    x, q = squares(40, 1)
    right = []
    for i in range(40):
        a = where(m, x[i], 'square')
        assert a.shape==(64,64) and a.dtype==np.float32 and 0<=a.min() and a.max()<=1
        if q[i]<0: assert a.max()<.5
        else: right.append(np.argmax([a[r:r+32,c:c+32].sum() for r in (0,32) for c in (0,32)])==q[i])
    assert np.mean(right)>=.9
    turned = where(m, x[0].flip(2), 0)
    assert turned.shape==(64,64)

@pytest.mark.parametrize('head', ['conv', 'fc', 'linear'])
def test_where_takes_any_chip_and_leaves_the_model_alone(head):
    m = make(head=head).train()
    state = {k:v.clone() for k,v in m.state_dict().items()}
    chip = np.random.default_rng(0).integers(0, 256, (120,90,3), dtype='u1')
    a = where(m, chip, 'road')
    assert a.shape==(120,90) and m.training and all(torch.equal(state[k], v) for k,v in m.state_dict().items()) and all(p.grad is None for p in m.parameters())
    np.testing.assert_allclose(where(m, torch.tensor(chip).permute(2,0,1), 2), a, atol=1e-6)
    from PIL import Image
    np.testing.assert_allclose(where(m, Image.fromarray(chip), 'road', size=64), a, atol=1e-6)
    with torch.inference_mode(): np.testing.assert_allclose(where(freeze_pretrained(m), torch.tensor(chip).permute(2,0,1)/255, 'road'), a, atol=1e-5)
    with pytest.raises(InputError, match="did you mean 'road'"): where(m, chip, 'roads')
    with pytest.raises(InputError, match='known|did you mean'): where(m, chip, 3)
    with pytest.raises(InputError, match='an array is'): where(m, chip[...,0], 'road')

def test_drawing():
    import matplotlib
    matplotlib.use('Agg')
    m = make(head='conv')
    fig = draw_where(m, pictures()[0], labels=dict(field=1, houses=0, road=None))
    titles = {a.get_title() for a in fig.axes}
    assert len(fig.axes)==4 and any('houses' in t and 'label: no' in t for t in titles) and any('unmapped' in t for t in titles)
    assert len(draw_where(m, pictures()[0], ['road']).axes)==2

def test_names_that_the_users_import():
    from imagesim.loader import SkywayDataset as theirs
    assert SkywayDataset is theirs and list(layer_groups(make()))==['stem','layer1','layer2','layer3','layer4','head']
