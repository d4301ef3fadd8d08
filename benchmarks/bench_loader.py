"""Loader: images a second against a plain Pillow loader, with 0, 1 and 2 workers, from jpgs and virtual chips; what feeding costs a training step.

    python benchmarks/bench_loader.py [--quick] [--folder DIR] [--step] [--backbone resnet50] [--size 224] [--batch 64] [--raw]

The plain loader is what one writes first: open, convert, resize to 224, ToTensor, a DataFrame row for the labels. The loaders run in turns over the same chips, warm, and the best of the turns counts.
`--step` measures instead a training step fed by the loader against the same step fed from memory. On a GPU it runs with AMP and channels_last; without one, squeezenet1_0 at 96 px.
"""
import argparse, os, time

from common import Workplace, full_tile, table

import numpy as np, pandas as pd, torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import models, transforms as T

from imagesim.chip import chip_ard
from imagesim.loader import SkywayDataset, chip_loader, default_workers, decode_chip
from imagesim.read import ChipStore

PUBLISHED = {'V100, published (AMP, ResNet50, 224 px)':1200, 'A100, published (AMP, ResNet50, 224 px)':2470}

class Plain(Dataset):
    "A row of a DataFrame, Pillow, Resize, ToTensor"
    def __init__(self, frame, folder, size): self.df, self.folder, self.t = frame, folder, T.Compose([T.Resize((size,size)), T.ToTensor()])
    def __len__(self): return len(self.df)
    def __getitem__(self, i):
        d = self.df.iloc[i]
        return self.t(Image.open(os.path.join(self.folder, d.Feature)).convert('RGB')), torch.tensor(d.iloc[1:].tolist(), dtype=torch.float32)

def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='less of everything: a look, not a measurement')
    p.add_argument('--folder', default='/dev/shm' if os.access('/dev/shm', os.W_OK) else None, help='where to work')
    p.add_argument('--step', action='store_true', help='a training step fed by the loader against one fed from memory')
    p.add_argument('--backbone', help='resnet50 on a GPU, squeezenet1_0 on a CPU, when left out')
    p.add_argument('--size', type=int, help='side, pixels; 224, or 96 for a step on a CPU, when left out')
    p.add_argument('--batch', type=int, default=64)
    p.add_argument('--workers', type=int, help='for --step; as the loader chooses when left out')
    p.add_argument('--raw', action='store_true', help='for --step: decode on the GPU')
    return p.parse_args()

def chips(place, n:int):
    "Write a tile, its jpgs and its virtual chips; return the table and both folders"
    full_tile(place.root/'ard')
    jpgs, virtual = place.fresh(), place.fresh()
    chip_ard(place.root/'ard', jpgs/'33', proc=1)
    chip_ard(place.root/'ard', virtual/'33', proc=1, virtual=True)
    names = np.random.default_rng(0).permutation(ChipStore(jpgs).names())[:n]
    frame = pd.DataFrame(dict(Feature=names) | {f'c{i:02}':np.random.default_rng(i).integers(0, 2, len(names)) for i in range(13)})
    return frame, jpgs, virtual

def seconds(loader)->float: # of a pass, the workers being there
    start, n = time.perf_counter(), 0
    for b in loader: n += len(b[0])
    assert n
    return time.perf_counter()-start

def rates(place, args):
    size, turns = args.size or 224, 2 if args.quick else 5
    frame, jpgs, virtual = chips(place, 256 if args.quick else 1024)
    rows = [('how', 'workers', 'images/s', 'against plain Pillow')]
    for w in (0,1,2):
        more = dict(persistent_workers=True) if w else {}
        loaders = {'plain Pillow':DataLoader(Plain(frame, jpgs/'33', size), args.batch, shuffle=True, num_workers=w, **more)}
        for name,folder in (('imagesim, jpgs', jpgs), ('imagesim, virtual chips', virtual)): loaders[name] = chip_loader(SkywayDataset(frame, folder, size=size), args.batch, True, workers=w)
        best = dict.fromkeys(loaders, float('inf'))
        for turn in range(turns+1):
            for k,l in loaders.items():
                t = seconds(l)
                if turn: best[k] = min(best[k], t) # the first pass starts the workers
        rows += [(k, w, f'{len(frame)/t:,.0f}', f"{best['plain Pillow']/t:.2f} x") for k,t in best.items()]
        del loaders
    table(f'{len(frame):,} chips of 512 px to {size} px, batches of {args.batch}', rows)
    ways(ChipStore(virtual).read(frame.Feature[:128]), size)

def ways(jpgs, size):
    "Where the time goes: each way to a picture of the right size, one core"
    torch.set_num_threads(1)
    import io
    from torchvision.io import ImageReadMode, decode_jpeg
    resize = lambda x: torch.nn.functional.interpolate(x[None], (size,size), mode='bilinear', antialias=True)[0]
    whole = lambda d: decode_jpeg(torch.frombuffer(bytearray(d), dtype=torch.uint8), mode=ImageReadMode.RGB)
    pillow = lambda d: np.asarray(Image.open(io.BytesIO(d)).convert('RGB').resize((size,size), Image.Resampling.BILINEAR))
    fns = {'Pillow, whole, resize':pillow, 'torchvision, whole':whole, 'torchvision, whole, antialiased':lambda d: resize(whole(d)), 'decode_chip':lambda d: decode_chip(d, size)}
    ruler = [torch.nn.functional.interpolate(whole(d)[None].float(), (size,size), mode='bilinear', antialias=True)[0] for d in jpgs[:32]]
    best = dict.fromkeys(fns, float('inf'))
    for _ in range(5):
        for k,f in fns.items():
            t = time.process_time()
            for d in jpgs: f(d)
            best[k] = min(best[k], time.process_time()-t)
    err = {k:np.mean([(torch.as_tensor(np.array(f(d))).permute(2,0,1) if k.startswith('Pillow') else f(d)).float().sub(r).abs().mean().item() for d,r in zip(jpgs, ruler)])
           for k,f in fns.items() if 'whole'!=k[-5:]}
    table('Decoding, CPU time of one core', [('how','images/s','mean error, of 255')]+[(k, f'{len(jpgs)/t:,.0f}', f'{err[k]:.2f}' if k in err else '') for k,t in best.items()])

def trainer(args, device, classes:int):
    "Make a function that does one training step with a batch"
    net = getattr(models, args.backbone)(num_classes=classes).to(device, memory_format=torch.channels_last).train()
    opt, loss = torch.optim.SGD(net.parameters(), 1e-3, momentum=.9), torch.nn.BCEWithLogitsLoss()
    gpu = device.type=='cuda'
    torch.backends.cudnn.benchmark = gpu
    def step(image, label):
        x = image.to(device, non_blocking=True).to(memory_format=torch.channels_last).float().div_(255)
        with torch.autocast(device.type, torch.float16 if gpu and torch.cuda.get_device_capability()[0]<8 else torch.bfloat16, enabled=gpu): out = loss(net(x), label.to(device, non_blocking=True))
        opt.zero_grad(set_to_none=True)
        out.backward()
        opt.step()
    return step

def steps(place, args):
    gpu = torch.cuda.is_available()
    device = torch.device('cuda' if gpu else 'cpu')
    args.backbone, size, turns = args.backbone or ('resnet50' if gpu else 'squeezenet1_0'), args.size or (224 if gpu else 96), 2 if args.quick else 5
    frame, _, virtual = chips(place, 1024 if gpu or not args.quick else 192)
    n = len(frame)-len(frame)%args.batch
    step = trainer(args, device, 13)
    workers = default_workers() if args.workers is None else args.workers
    loader = chip_loader(SkywayDataset(frame, virtual, size=size, raw=args.raw), args.batch, True, workers=workers, drop_last=True)
    kept = [(b.image.to(device).clone(), b.label.to(device)) for b in loader][:8] # on the device already
    wait = torch.cuda.synchronize if gpu else lambda: None
    def run(batches):
        wait()
        start = time.perf_counter()
        for x,y in batches: step(x, y)
        wait()
        return n/(time.perf_counter()-start)
    repeat = 8 if gpu else 1 # epochs a turn, so that the start of an epoch counts as it does in training
    fed = lambda: ((b.image, b.label) for _ in range(repeat) for b in loader)
    memory = lambda: (kept[i%len(kept)] for i in range(repeat*n//args.batch))
    run(memory())
    a = b = 0
    for _ in range(turns): a, b = max(a, repeat*run(memory())), max(b, repeat*run(fed()))
    name = torch.cuda.get_device_name() if gpu else f'{torch.get_num_threads()} CPU threads'
    rows = [('step', 'images/s', 'share'), ('fed from memory', f'{a:,.0f}', ''), (f'fed by the loader, {workers} workers{", decoded on the GPU" if args.raw else ""}', f'{b:,.0f}', f'{b/a:.1%}')]
    table(f'{args.backbone}, {size} px, batches of {args.batch}, {name}', rows+[(k, f'{v:,}', '') for k,v in PUBLISHED.items()])
    print(f'  90 % of the step fed from memory: {"ok" if b>=.9*a else "MISSED"}')

if __name__=='__main__':
    args = parse()
    print(f'torch {torch.__version__}, Pillow {Image.__version__}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}')
    with Workplace(args.folder) as place: (steps if args.step else rates)(place, args)
