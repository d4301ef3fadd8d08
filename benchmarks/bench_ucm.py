"""UC Merced with 17 labels, in the split of the AiTLAS Arena (1285 / 395 / 420): a probe on frozen features, and the fine-tuned network beside it.

mobilenet_v2 with real ImageNet weights, on the CPU; or ResNet50 from random weights, where there is a GPU. The recipe was chosen on val; test is looked at by each run once, at its end.
The data lie beside the project (shared/data/ucm, shared/data/weights). The folder of the run stays, for the tutorial on learning strategies and for retrieval.

    python benchmarks/bench_ucm.py [--quick] [--out DIR] [--name RUN] [--loss LOSS] [--epochs N] [--seed N] [--no-probe]
    python benchmarks/bench_ucm.py --gpu [--quick] [--out DIR]
"""
import argparse, ctypes, os, sys, tempfile, time, warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault('IMAGESIM_PROGRESS', 'false')

SHARED = Path(__file__).resolve().parent.parent.parent/'shared'/'data'
PICTURES, TABLE, WEIGHTS = SHARED/'ucm/images', SHARED/'ucm/multilabels.csv', SHARED/'weights/mobilenet_v2-imagenet.safetensors'
ARENA = [('Arena, ResNet50 from ImageNet, test', .9567), ('Arena, best of ten (SwinT), test', .9683)] # macro mAP of the AiTLAS Arena
SCRATCH = [('Arena, ResNet50 from scratch, val', .833)]

TUNED = dict(backbone='mobilenet_v2', padding='tensorflow', size=256, loss='bce+contrastive', projection=128, epochs=16, batch_size=32, head='conv', freeze_epochs=1, lr=1e-3, backbone_lr_scale=.3,
             layer_decay=.7, weight_decay=.05, dropout=.3, augment=.5, class_weights=0., balance=False, patience=0, precision='bf16-mixed', channels_last=True)
FROM_SCRATCH = dict(backbone='resnet50', weights=None, size=224, loss='bce', epochs=200, batch_size=64, freeze_epochs=0, lr=1e-3, weight_decay=.05, dropout=.3, augment=1., class_weights=0., balance=False, patience=0)

def keep_memory():
    "Tell glibc to keep what it was given: handing every large buffer back and asking for it again was half the time of a training step on the CPU"
    try:
        for what,value in ((-4,0), (-1,-1), (-2,1<<28)): ctypes.CDLL('libc.so.6').mallopt(what, value) # no mmap, no trimming, 256 MB at a time
    except OSError: pass # another system

def show(title:str, rows:list):
    width = [max(len(str(r[i])) for r in rows) for i in range(len(rows[0]))]
    print(f'\n{title}')
    for k,r in enumerate(rows):
        print('  '+'  '.join(f'{str(c):<{w}}' if i==0 else f'{str(c):>{w}}' for i,(c,w) in enumerate(zip(r,width))))
        if k==0: print('  '+'  '.join('-'*w for w in width))
    sys.stdout.flush()

def percent(x)->str: return f'{100*x:.2f}'

def network(t, padding:str, size:int):
    "The backbone as it came"
    import torch
    from imagesim.model import MultilabelResnetFC
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='.*FOLDED.*') # as said below
        net = MultilabelResnetFC(t.classes, 'mobilenet_v2', str(WEIGHTS), padding=padding, size=size)
    return net.to('cuda' if torch.cuda.is_available() else 'cpu').eval()

def settled(t, out:Path, recipe:dict)->Path:
    "Give the batch norms back their statistics, which the file has folded into the convolutions, and keep the weights beside the runs: all runs begin alike, and an interrupted one goes on"
    from safetensors.torch import save_file
    from imagesim.infra import atomic_path
    from imagesim.loader import SkywayDataset, chip_loader
    from imagesim.model import settle_norms
    path = out/f"mobilenet_v2-{recipe['padding']}-{recipe['size']}.safetensors"
    if path.exists(): return path
    net = network(t, recipe['padding'], recipe['size'])
    settle_norms(net, chip_loader(SkywayDataset(t, PICTURES, rows=t.rows('train')[::3], size=recipe['size']), 32))
    out.mkdir(parents=True, exist_ok=True)
    with atomic_path(str(path)) as tmp: save_file({k:v.cpu().contiguous() for k,v in net.backbone.state_dict().items()}, tmp)
    return path

def frozen_features(t, padding:str, size:int):
    "Look at every picture once with the network as it came"
    import numpy as np, torch
    from imagesim.loader import SkywayDataset, chip_loader
    net = network(t, padding, size).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        return np.concatenate([net.features(b.image.to(net.mean.device).contiguous(memory_format=torch.channels_last))['features'].float().cpu().numpy() for b in chip_loader(SkywayDataset(t, PICTURES, size=size), 64)])

def probe(t, x, fit, score, C:float=.01)->dict:
    "Fit a logistic regression a label"
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from imagesim.metrics import multilabel_metrics
    y = (t.states==1).numpy()
    z = (x-x[fit].mean(0))/(x[fit].std(0)+1e-6)
    p = np.stack([LogisticRegression(C=C, max_iter=500).fit(z[fit], y[fit,k]).predict_proba(z[score])[:,1] for k in range(y.shape[1])], 1)
    return multilabel_metrics(p, y[score], None, t.classes)

def probes(t, quick:bool)->list:
    import numpy as np
    tr, va, te = (t.rows(s) for s in ('train','val','test'))
    out = []
    for padding,size in (('torch',224),) if quick else (('torch',224), ('tensorflow',256)):
        s = time.perf_counter()
        x = frozen_features(t, padding, size)
        v, m = probe(t, x, tr, va), probe(t, x, np.r_[tr,va], te)
        out.append((f'probe, padding of {padding}, {size} px', percent(v['map_macro']), percent(m['map_macro']), f"{m['f1_samples']:.3f}", f'{time.perf_counter()-s:.0f}'))
    return out

def trained(t, name:str, out:Path, recipe:dict)->tuple:
    from imagesim.train import train
    s = time.perf_counter()
    run = train(t, name, chips=PICTURES, out=out, **recipe)
    return run, time.perf_counter()-s

def lines(run, seconds:float, views:bool)->list:
    "One look at each picture, and the average of its eight poses"
    from imagesim.train import evaluate
    m, out = run.metrics, []
    out.append((f'{run.name}, one view', percent(m['val']['map_macro']), percent(m['test']['map_macro']), f"{m['test']['f1_samples']:.3f}", f'{seconds:.0f}'))
    if views:
        s = time.perf_counter()
        v, m = (evaluate(run, k, tta=True) for k in ('val','test'))
        out.append((f'{run.name}, eight views', percent(v['map_macro']), percent(m['map_macro']), f"{m['f1_samples']:.3f}", f'{time.perf_counter()-s:.0f}'))
    return out

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='two epochs of small pictures: a look, not a measurement')
    p.add_argument('--gpu', action='store_true', help='ResNet50 from random weights, on a GPU')
    p.add_argument('--out', help='folder of runs; a temporary one when left out. An interrupted run of the same name goes on')
    p.add_argument('--name', help='name of the run')
    p.add_argument('--loss', help='another loss')
    p.add_argument('--epochs', type=int)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--no-probe', action='store_true')
    a = p.parse_args()
    if not TABLE.exists(): raise SystemExit('shared/data/ucm is not beside the project: nothing to measure')
    import torch
    from imagesim.loader import TrainingTable
    if a.gpu and not torch.cuda.is_available(): raise SystemExit('--gpu: no GPU here')
    keep_memory()
    t = TrainingTable.from_csv(TABLE, split='split', ignore=['scene'], name='ucm')
    recipe = dict(FROM_SCRATCH if a.gpu else TUNED, seed=a.seed)
    if torch.cuda.is_available(): recipe |= dict(precision='auto', channels_last=None)
    if a.loss: recipe |= dict(loss=a.loss) | ({} if 'contrastive' in a.loss else dict(projection=0))
    if a.quick: recipe |= dict(epochs=2, size=128)
    if a.epochs: recipe |= dict(epochs=a.epochs)
    out = Path(a.out or tempfile.mkdtemp(prefix='bench-ucm-'))
    name = a.name or ('resnet50-scratch' if a.gpu else 'ucm-'+recipe['loss'].replace('+','-'))+('-quick' if a.quick else '')
    print(f'{name}: '+', '.join(f'{k} {v}' for k,v in recipe.items() if k!='weights'))
    rows = [('macro mAP in percent; F1 by samples at 0.35', 'val', 'test', 'F1', 'seconds')]
    if not (a.gpu or a.no_probe): rows += probes(t, a.quick)
    if not a.gpu: recipe['weights'] = str(settled(t, out, recipe))
    run, seconds = trained(t, name, out, recipe)
    rows += lines(run, seconds, views=not a.quick)
    rows += [(k, percent(v), '', '', '') if a.gpu else (k, '', percent(v), '', '') for k,v in (SCRATCH if a.gpu else ARENA)]
    show('UC Merced, 17 labels', rows)
    print(f'  run folder: {run.path}')

if __name__=='__main__': main()
