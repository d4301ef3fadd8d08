"""Encoding: `encode` from files to files, against the bare forward pass on pictures in memory, and against a plain loop.

    python benchmarks/bench_encode.py [--quick] [--backbone resnet50] [--weights FILE] [--device cuda] [--chips 2048] [--workers N] [--precision auto] [--threads N]

Needs torch, torchvision and imagesim's floor 4, no raster library, so it runs on a bare GPU machine. All ways take turns, and the median of the turns counts.
The plain loops do what a tutorial does: (a) Pillow and the network, one chip after the other; (b) torchvision's transforms in a DataLoader with its defaults and batches of 32.
"""
import argparse, io, os, statistics, sys, tempfile, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault('IMAGESIM_PROGRESS', 'false')

import numpy as np, pyarrow as pa, torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from imagesim.ard import Cell
from imagesim.bundle import IMAGENET, LayerNet, default_layer, load_encoder, make_backbone
from imagesim.encode import encode, read_embeddings
from imagesim.read import ChipIndex, index_path, write_chip_index

SHARED = Path(__file__).resolve().parent.parent.parent/'shared'/'data'

def ground(k:int, px=512)->bytes:
    "A jpg of 512 pixels with the entropy of a town: four real pictures where they are at hand, else noise"
    rng, files = np.random.default_rng(k), sorted((SHARED/'ucm/images').glob('*.jpg')) if (SHARED/'ucm/images').is_dir() else []
    if files: quarter = lambda: np.asarray(Image.open(files[rng.integers(len(files))]).convert('RGB').resize((px//2,px//2)))
    else: quarter = lambda: np.clip(110+40*np.sin(np.arange(px//2)/rng.uniform(5,40))[:,None,None]+rng.normal(0,11,(px//2,px//2,3)), 0, 255).astype('u1')
    out = io.BytesIO()
    Image.fromarray(np.concatenate([np.concatenate([quarter(), quarter()], 1) for _ in range(2)])).save(out, 'JPEG', quality=75)
    return out.getvalue()

def make_chips(root:Path, n:int)->list[Path]:
    "Loose chips with an index beside them, several tiles of up to 1024"
    pics, paths = [ground(k) for k in range(64)], []
    (root/'chips/33').mkdir(parents=True)
    places = [c.id for c in Cell.parse('Z33-031311023120').children(17)]
    for t in range(-(-n//1024)):
        names = [f'{p}_BENCH{t}.jpg' for p in places[:min(1024, n-1024*t)]]
        for i,m in enumerate(names):
            paths.append(root/'chips/33'/m)
            paths[-1].write_bytes(pics[(i+7*t)%64])
        one, none = np.ones(len(names), 'f4'), lambda typ: pa.nulls(len(names), typ)
        cols = dict(chip=names, path=names, offset=none(pa.int64()), length=none(pa.int32()), valid=one, clear=one, date=none(pa.date32()), off_nadir=one, view_azimuth=one)
        write_chip_index(index_path(root/'chips/index', 'Z33-031311023120', f'BENCH{t}'), ChipIndex(pa.table(cols), dict(jpgs=True, fingerprint=str(t), level=17, cog='none', delivery='.')))
    return paths

class Files(Dataset):
    def __init__(self, paths, size): self.paths, self.how = paths, T.Compose([T.Resize((size,size)), T.ToTensor(), T.Normalize(IMAGENET['mean'], IMAGENET['std'])])
    def __len__(self): return len(self.paths)
    def __getitem__(self, i): return self.how(Image.open(self.paths[i]).convert('RGB'))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='less of everything: a look, not a measurement')
    p.add_argument('--backbone', default=None); p.add_argument('--weights', default='random'); p.add_argument('--device', default='auto'); p.add_argument('--precision', default='auto')
    p.add_argument('--chips', type=int, default=None); p.add_argument('--workers', type=int, default=None); p.add_argument('--batch', type=int, default=None)
    p.add_argument('--threads', type=int, default=None); p.add_argument('--size', type=int, default=224); p.add_argument('--turns', type=int, default=3)
    a = p.parse_args()
    if a.threads: torch.set_num_threads(a.threads)
    gpu = a.device!='cpu' and torch.cuda.is_available()
    spec = dict(backbone=a.backbone or ('resnet50' if gpu else 'mobilenet_v2'), weights=a.weights, size=a.size)
    enc = load_encoder(spec, a.device, a.precision)
    n, batch = a.chips or ((16384 if gpu else 256)//(8 if a.quick else 1)), a.batch or (256 if gpu else 32)
    bare = make_backbone(spec['backbone'])
    if a.weights!='random':
        from imagesim.model import read_weights
        bare.load_state_dict(read_weights(a.weights), strict=False)
    plain = LayerNet(bare, *default_layer(bare), **IMAGENET).eval().to(enc.device)
    sync = (lambda: torch.cuda.synchronize()) if gpu else (lambda: None)
    with tempfile.TemporaryDirectory(dir='/dev/shm' if os.access('/dev/shm', os.W_OK) else None) as folder:
        root = Path(folder)
        paths, turn = make_chips(root, n), [0]
        resident = torch.randint(0, 256, (batch,3,a.size,a.size), dtype=torch.uint8).to(enc.device)
        few = paths[:n//4 if not gpu else 1024]
        def forward():
            for _ in range(-(-n//batch)): enc.run(resident)
            sync(); return -(-n//batch)*batch
        def ours():
            turn[0] += 1
            s = encode(enc, root/'chips', root/f'out{turn[0]}', batch_size=batch, workers=a.workers)
            assert s.exit_code==0 and s.extra['chips']==n; busy.append(s.extra['network busy']); return n
        how = Files(few, a.size)
        def one(x):
            from imagesim.bundle import _Stop
            try: plain.net(x.to(enc.device))
            except _Stop as s: return s.args[0].mean((2,3)).cpu()
        @torch.inference_mode()
        def plain_one():
            for i in range(len(few)): one(how[i][None])
            return len(few)
        @torch.inference_mode()
        def plain_batches():
            for x in DataLoader(how, batch_size=32): one(x)
            return len(few)
        ways, busy, rates = dict(forward=forward, ours=ours, plain_one=plain_one, plain_batches=plain_batches), [], {}
        enc.run(resident); sync()
        for _ in range(1 if a.quick else a.turns):
            for k,f in ways.items():
                begun = time.perf_counter()
                done = f()
                rates.setdefault(k, []).append(done/(time.perf_counter()-begun))
        r = {k:statistics.median(v) for k,v in rates.items()}
        size = sum(f.stat().st_size for f in (root/'out1').rglob('*.parquet'))
        begun = time.perf_counter(); v = read_embeddings(root/'out1')[1]; read = len(v)/(time.perf_counter()-begun)
    print(f'{spec["backbone"]}, {a.size} px, {n:,} chips, {torch.cuda.get_device_name(enc.device) if gpu else f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"}, {enc.precision}, batch {batch}\n')
    for k,name in dict(forward='bare forward pass, pictures in memory', ours='encode, from files to files', plain_one='plain loop, one by one', plain_batches='plain loop, DataLoader').items():
        print(f'  {name:40} {r[k]:10,.1f} chips/s   {", ".join(f"{o:,.1f}" for o in rates[k])}')
    print(f'\n  encode / bare forward {r["ours"]/r["forward"]:.0%}; network busy {busy}\n  encode / plain loop {r["ours"]/r["plain_one"]:.2f} x one by one, {r["ours"]/r["plain_batches"]:.2f} x DataLoader')
    print(f'  {size/n:,.0f} bytes a chip on disk; read back at {read:,.0f} chips/s')

if __name__=='__main__': main()
