"""Encoder bundles: identity, damage, forgery, buckets, runs of ours and modules of others"""
import errno, json, os, shutil, subprocess, sys
from pathlib import Path

import numpy as np, pytest, torch
from torch import nn

from conftest import ROOT
from imagesim.bundle import (LayerNet, _canonical, _seal, check_bundle, choose_device, choose_precision, fold_batchnorm, identity, load_encoder, make_backbone, make_bundle,
    open_bundle, register_encoder)
from imagesim.compress import fit_pca
from imagesim.infra import CorruptError, ImagesimError, InputError, MissingError, StorageError

SPEC = dict(backbone='squeezenet1_0', weights='random', size=64)
PICTURES = np.random.default_rng(0).integers(0, 256, (4,3,64,64), dtype='u1')

@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    "A bundle with a projection; read only"
    root = tmp_path_factory.mktemp('bundle')
    v = load_encoder(SPEC, 'cpu').encode(np.random.default_rng(1).integers(0, 256, (20,3,64,64), dtype='u1'))[0]
    return make_bundle(SPEC, root/'plain', projection=fit_pca(v, 8), licence='BSD-3', credits=['somebody'])

@pytest.fixture
def copy(plain, tmp_path):
    shutil.copytree(plain.path, tmp_path/'copy')
    return tmp_path/'copy'

def test_same_spec_same_bytes_same_identity(plain, tmp_path):
    a, b = (make_bundle(SPEC, tmp_path/n) for n in 'ab')
    assert a.hash==b.hash!=plain.hash and (tmp_path/'a/weights.safetensors').read_bytes()==(tmp_path/'b/weights.safetensors').read_bytes()
    assert not [p for p in tmp_path.iterdir() if p.name[0]=='.'] and oct((tmp_path/'a').stat().st_mode)[-3:]=='755'

@pytest.fixture(scope='module')
def bare(): return load_encoder(SPEC, 'cpu').hash

@pytest.mark.parametrize('change', [dict(layer='features.7'), dict(size=80), dict(pool='max'), dict(mean=(0,0,0))], ids=str)
def test_what_changes_a_vector_changes_the_identity(change, bare): assert load_encoder(SPEC|change, 'cpu').hash!=bare

@pytest.mark.parametrize('change', [dict(name='x'), dict(licence='y'), dict(credits='z')], ids=str)
def test_what_does_not_change_a_vector_does_not(change, bare): assert load_encoder(SPEC|change, 'cpu').hash==bare

def test_every_byte_counts(plain, copy):
    rng = np.random.default_rng(0)
    for name in ('bundle.json', 'weights.safetensors', 'projection.safetensors'):
        data = (copy/name).read_bytes()
        for at in rng.integers(0, len(data), 25):
            bad = bytearray(data); bad[at] ^= 1+int(rng.integers(255))
            (copy/name).write_bytes(bad)
            assert [o[0] for o in check_bundle(copy)]==[name], at
            if name!='bundle.json':
                with pytest.raises(CorruptError, match=name): load_encoder(copy, 'cpu')
        (copy/name).write_bytes(data)
    assert check_bundle(copy)==[]
    (copy/'run.py').write_text('print(1)')
    assert check_bundle(copy)==[('run.py', 'does not belong here')]
    (copy/'weights.safetensors').unlink()
    assert ('weights.safetensors' in dict(check_bundle(copy))) and pytest.raises(MissingError, open_bundle, copy)

def forge(folder, **changes):
    facts = json.loads((folder/'bundle.json').read_bytes()) | changes
    facts = {k:v for k,v in facts.items() if v is not ...}
    try: facts['hash'] = identity(facts); facts['seal'] = _seal(facts)
    except (KeyError, TypeError, AttributeError): pass
    (folder/'bundle.json').write_bytes(_canonical(facts)+b'\n')

@pytest.mark.parametrize('changes', [dict(name='../x'), dict(name='a/b'), dict(name=''), dict(name=5), dict(size='64'), dict(size=True), dict(size=10**9), dict(dim=0), dict(mean=[1,2]), dict(std=[0,1,1]),
    dict(mean=[float('1e99'),0,0]), dict(classes=[]), dict(classes=[1]), dict(files={}), dict(files=[]), dict(kind='pickle'), dict(kind=...), dict(credits=[3]), dict(form='1'), dict(form=2), dict(options=[]),
    dict(files={'../../x':dict(size=1, sha256='0')}), dict(backbone='no_such_net'), dict(backbone='resnet18'), dict(layer='nowhere'), dict(features=7), dict(kind='run'), dict(kind='registered'), dict(dim=9)], ids=str)
def test_forged_facts_are_refused_in_one_line(copy, changes):
    forge(copy, **changes)
    with pytest.raises(ImagesimError) as e: load_encoder(copy, 'cpu')
    assert '\n' not in str(e.value) and len(str(e.value))<900

@pytest.mark.parametrize('text', [b'', b'[]', b'{}', b'null', b'{"form":1}', b'\xff', b'{"form":1,"name":{}}'])
def test_odd_json(copy, text):
    (copy/'bundle.json').write_bytes(text)
    with pytest.raises(CorruptError): open_bundle(copy)

def test_folders_are_never_written_over(plain, tmp_path):
    (tmp_path/'full').mkdir(); (tmp_path/'full/notes.txt').write_text('mine')
    with pytest.raises(InputError, match='other files'): make_bundle(SPEC, tmp_path/'full')
    (tmp_path/'empty').mkdir()
    assert make_bundle(SPEC, tmp_path/'empty').hash
    with pytest.raises(InputError, match='never changed'): make_bundle(SPEC|dict(size=96), tmp_path/'empty')
    with pytest.raises(InputError): make_bundle(SPEC, tmp_path/'full/notes.txt/x')

def test_a_bundle_in_a_bucket(plain, bucket):
    b = make_bundle(plain, f'{bucket}/enc')
    assert (b.hash, b.licence, b.credits)==(plain.hash, 'BSD-3', ['somebody']) and check_bundle(f'{bucket}/enc')==[]
    assert np.array_equal(load_encoder(f'{bucket}/enc', 'cpu').encode(PICTURES)[0], load_encoder(plain, 'cpu').encode(PICTURES)[0])
    with pytest.raises(MissingError, match='neither'): load_encoder(f'{bucket}/none')

def test_a_registered_module_with_classes_and_weights(tmp_path):
    class Small(nn.Module):
        def __init__(self, wide=6):
            super().__init__()
            self.conv, self.to_classes = nn.Conv2d(3, wide, 3), nn.Linear(wide, 2)
        def forward(self, x):
            v = self.conv(x).mean((2,3))
            return v, self.to_classes(v).sigmoid()
    register_encoder('small', Small)
    spec = dict(registered='small', size=32, classes=['a','b'], options=dict(wide=5), weights='random')
    b = make_bundle(spec, tmp_path/'b')
    v, p = load_encoder(b, 'cpu').encode(PICTURES)
    assert v.shape==(4,5) and p.shape==(4,2) and np.allclose(np.linalg.norm(v, axis=1), 1, atol=1e-5) and (0<=p).all() and (p<=1).all()
    with pytest.raises(InputError, match='3 classes'): make_bundle(spec|dict(classes=['a','b','c']), tmp_path/'c')
    with pytest.raises(InputError, match='options'): make_bundle(spec|dict(options=dict(tall=1)), tmp_path/'c')
    code = f'from imagesim.bundle import load_encoder\ntry: load_encoder({str(tmp_path/"b")!r})\nexcept ValueError as e: print(e)'
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT).stdout
    assert "register_encoder('small', …)" in said
    assert not (tmp_path/'c').exists()

def test_a_module_that_gives_nonsense(tmp_path):
    class Bad(nn.Module):
        def __init__(self, what): super().__init__(); self.what = what
        def forward(self, x): return dict(map=x, nan=x.mean((2,3))*float('nan'), three=(x,x,x), text='v')[self.what]
    register_encoder('bad', Bad)
    for what in ('map','nan','three','text'):
        with pytest.raises(ImagesimError): make_bundle(dict(registered='bad', size=32, options=dict(what=what)), tmp_path/'x')
    register_encoder('none', lambda: 3)
    with pytest.raises(InputError, match='nn.Module'): load_encoder(dict(registered='none', size=32))

def test_a_bundle_of_a_run(tmp_path):
    from safetensors.torch import save_file
    from imagesim.model import MultilabelResnetFC
    torch.manual_seed(0)
    net = MultilabelResnetFC(['a','b','c'], 'tinynet', 'checkpoint', 'conv', loss='bce+contrastive', embedding='projection', projection=16).eval()
    run = tmp_path/'models/r'; run.mkdir(parents=True)
    (run/'config.json').write_text(json.dumps(dict(form=1, run='r', classes=['a','b','c'], recipe=dict(backbone='tinynet', head='conv', embedding='projection', projection=16, size=64))))
    with pytest.raises(MissingError, match='let the training end'): make_bundle(run, tmp_path/'b')
    save_file(net.state_dict(), run/'weights.safetensors')
    (run/'schema.toml').write_text('name = "x"\n')
    (run/'dataset.json').write_text(json.dumps(dict(schema=dict(name='x', hash='12'), credits=['OSM, ODbL'])))
    b = make_bundle(run, tmp_path/'b')
    v, p = load_encoder(b, 'cpu').encode(PICTURES)
    with torch.inference_mode(): want, logits = net.embed_and_score(torch.from_numpy(PICTURES))
    assert np.allclose(v, want, atol=1e-4) and np.allclose(p, logits.sigmoid(), atol=1e-4) and (tmp_path/'b/schema.toml').read_text()=='name = "x"\n'
    assert load_encoder(run, 'cpu').hash==b.hash and b.credits==['OSM, ODbL'] and b.schema==dict(name='x', hash='12')
    (run/'config.json').write_text('{"run": 1}')
    with pytest.raises(CorruptError, match='not the configuration'): load_encoder(run)

def test_weights_of_another_network_and_pickles(tmp_path):
    from safetensors.torch import save_file
    state = make_backbone('squeezenet1_0').state_dict()
    save_file({k:v for k,v in state.items() if not k.startswith('classifier')}, tmp_path/'headless.safetensors')
    assert load_encoder(SPEC|dict(weights=tmp_path/'headless.safetensors'), 'cpu').dim==512
    save_file({k:v for k,v in state.items() if 'features.3' not in k}, tmp_path/'holes.safetensors')
    with pytest.raises(CorruptError, match='another network'): load_encoder(SPEC|dict(weights=tmp_path/'holes.safetensors'))
    save_file({k:v*float('nan') if 'features.3' in k else v for k,v in state.items()}, tmp_path/'nan.safetensors')
    with pytest.raises(CorruptError, match='NaN'): load_encoder(SPEC|dict(weights=tmp_path/'nan.safetensors'))
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'pwned'),)
    torch.save(dict(state_dict=state, extra=Evil()), tmp_path/'evil.pth')
    with pytest.raises(ImagesimError): load_encoder(SPEC|dict(weights=tmp_path/'evil.pth'))
    assert not (tmp_path/'pwned').exists()

@pytest.mark.parametrize('name', ['resnet18', 'mobilenet_v2'])
def test_folding_changes_no_answer(name):
    size = 64
    enc = load_encoder(dict(backbone=name, weights='random', size=size), 'cpu')
    x = torch.rand(2, 3, size, size)
    net = LayerNet(make_backbone(name), enc.facts['layer'], enc.facts['pool'], enc.mean, enc.std).eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.uniform_(-1, 1); m.running_var.uniform_(.5, 2); m.weight.data.uniform_(.5, 2)
    with torch.inference_mode(): was, now = net(x), fold_batchnorm(net, x)(x)
    assert was.shape==(2, enc.dim) and torch.allclose(was, now, rtol=1e-3, atol=1e-4)

def test_a_network_that_would_change_is_not_folded():
    class Twice(nn.Module): # uses its convolution a second time, without the normalisation
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.bn1.running_mean.fill_(2.)
        def forward(self, x): return self.conv1(self.bn1(self.conv1(x))).mean((2,3))
    net = Twice().eval()
    assert fold_batchnorm(net, torch.rand(1,3,16,16)) is net

def test_devices_and_precisions():
    assert choose_device('cpu').type=='cpu' and choose_precision('auto', torch.device('cpu'))==torch.float32
    for bad in ('gpu', 'cuda:99', ''):
        with pytest.raises(InputError): choose_device(bad)
    with pytest.raises(InputError, match='did you mean'): load_encoder(SPEC, 'cpu', precision='bfloat')

def test_pictures_of_any_size_and_nothing_else(plain):
    enc = load_encoder(plain, 'cpu')
    assert enc.encode(np.repeat(np.repeat(PICTURES, 2, 2), 2, 3))[0].shape==(4,8)
    for bad in (PICTURES.astype('f4'), PICTURES[0], PICTURES[:,:2]):
        with pytest.raises(InputError): enc.encode(bad)

def test_the_encoder_below_a_projection(plain):
    enc = load_encoder(plain, 'cpu')
    below, bare = enc.plain('below'), load_encoder(SPEC, 'cpu')
    assert (below.name, below.hash, below.dim)==('below', plain.facts['base'], 512)==('below', bare.hash, bare.dim) and (enc.dim, enc.name)==(8, 'squeezenet1_0')
    assert np.array_equal(below.encode(PICTURES)[0], bare.encode(PICTURES)[0]) and enc.encode(PICTURES)[0].shape==(4,8)
    assert bare.plain('x') is bare

def test_a_full_disk_is_not_a_name_that_is_taken(tmp_path, monkeypatch):
    for n,say in ((errno.ENOSPC,'the disk is full'), (errno.EROFS,'can not be written to'), (errno.EACCES,'check who owns it')):
        def full(*a, n=n): raise OSError(n, os.strerror(n))
        monkeypatch.setattr(os, 'rename', full)
        with pytest.raises(StorageError, match=say): make_bundle(SPEC, tmp_path/'b')
        assert os.listdir(tmp_path)==[]
