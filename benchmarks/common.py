"""What the benchmarks share: a full tile with real texture where it is at hand, a clock, a table"""
import argparse, os, shutil, sys, tempfile, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
for k in ('OMP_NUM_THREADS','OPENBLAS_NUM_THREADS','GDAL_NUM_THREADS'): os.environ.setdefault(k, '1')
os.environ.setdefault('IMAGESIM_PROGRESS', 'false')

import numpy as np, rasterio, rasterio.shutil
from PIL import Image
from rasterio.transform import from_origin
from rasterio.windows import Window

SHARED = Path(__file__).resolve().parent.parent.parent/'shared'/'data'
CELL, GSD = 'Z33-031311023120', 5000/16384

def textures(n:int, seed:int=0)->list:
    "Pictures of 256 pixels: UC Merced's where they are at hand (0.3 m, like the ARD), else noise of about the same entropy"
    rng = np.random.default_rng(seed)
    files = sorted((SHARED/'ucm/images').glob('*.jpg')) if (SHARED/'ucm/images').is_dir() else []
    if files: return [np.asarray(Image.open(files[i]).convert('RGB').resize((256,256))) for i in rng.choice(len(files), n, replace=n>len(files))]
    y,x = np.mgrid[:256,:256]
    return [np.clip(110+40*np.sin(x/rng.uniform(5,40)+y/rng.uniform(5,40))[...,None]+rng.normal(0,11,(256,256,3)), 1, 255).astype('u1') for _ in range(n)]

def full_tile(ard, catalog_id='BENCH', day='2021-05-01', cell=CELL, seed=0, missing=False)->Path:
    "Write a full 17408 px tile as the provider does: COG, JPEG YCbCr 75, 512 px blocks, internal mask; `missing` leaves an edge out"
    from imagesim.ard import Cell, tile_path
    c, n = Cell.parse(cell), 17408
    path = Path(tile_path(ard, c, day, catalog_id))
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp, pics, rng = path.with_suffix('.tmp'), textures(400, seed), np.random.default_rng(seed)
    box = c.buffered(156.25)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True, GDAL_CACHEMAX=256):
        with rasterio.open(tmp, 'w', driver='GTiff', width=n, height=n, count=3, dtype='uint8', crs=f'EPSG:{c.epsg}', transform=from_origin(box.left, box.top, GSD, GSD), tiled=True,
                           blockxsize=512, blockysize=512, compress='jpeg', photometric='ycbcr', jpeg_quality=75) as d:
            for r in range(0, n, 512):
                band = np.concatenate([np.concatenate([pics[rng.integers(400)] for _ in range(n//256)], axis=1) for _ in range(2)]).transpose(2,0,1)
                seen = np.broadcast_to((not missing) | (np.arange(n)[None]+.3*np.arange(r,r+512)[:,None]<15000), (512,n))
                d.write(band*seen, window=Window(0,r,n,512)); d.write_mask(seen, window=Window(0,r,n,512))
    tmp.rename(path)
    return path

def clock(fn, *args, repeat=1, **kw):
    "The best wall time of `repeat` calls, and the last result"
    best = float('inf')
    for _ in range(repeat):
        t = time.perf_counter()
        out = fn(*args, **kw)
        best = min(best, time.perf_counter()-t)
    return best, out

def table(title:str, rows:list):
    "Print rows of cells under their heads (the first row)"
    width = [max(len(str(r[i])) for r in rows) for i in range(len(rows[0]))]
    print(f'\n{title}')
    for k,r in enumerate(rows):
        print('  '+'  '.join(f'{str(c):<{w}}' if i==0 else f'{str(c):>{w}}' for i,(c,w) in enumerate(zip(r,width))))
        if k==0: print('  '+'  '.join('-'*w for w in width))

def peak_mb()->float:
    "Peak resident memory of this process (ru_maxrss would count what the parent had, too)"
    return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])/1024

def parse(doc:str):
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='less of everything: a look, not a measurement')
    p.add_argument('--folder', default='/dev/shm' if os.access('/dev/shm', os.W_OK) else None, help='where to work: memory when left out, so that the programs are compared and not the disk')
    return p.parse_args()

class Workplace:
    """A folder to work in, removed afterwards; every writer gets an empty folder of its own.

    On a disk nothing is deleted while clocks run: ext4 steers clear of inodes that were freed in the last minute, and creating files becomes many times slower for everybody.
    In memory (tmpfs) it is the other way round: what a turn wrote is dropped, because on a virtual machine pages that were never touched before are slow."""
    def __init__(self, folder=None):
        self.root, self.n = Path(tempfile.mkdtemp(prefix='bench-', dir=folder)), 0
        self.in_memory = any(l.split()[2]=='tmpfs' and str(self.root).startswith(l.split()[1]+'/') for l in open('/proc/mounts'))
    def used(self, path):
        if self.in_memory: shutil.rmtree(path)
    def __enter__(self): return self
    def __exit__(self, *e): shutil.rmtree(self.root, ignore_errors=True)
    def fresh(self)->Path:
        self.n += 1
        p = self.root/f'out{self.n}'
        p.mkdir()
        return p
