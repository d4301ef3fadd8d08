"""No-data from jpgs: the decoder's own scaling against full decoding, and agreement with the masks.

    python benchmarks/bench_nodata.py [--quick] [--folder DIR]
"""
import os, shutil
from pathlib import Path

from common import SHARED, Workplace, clock, full_tile, parse, table

import numpy as np
from PIL import Image

from imagesim.chip import chip_ard
from imagesim.nodata import chip_class, make_nodata_index
from imagesim.read import DATA_CLASSES, ChipStore, data_class, find_chips, read_chip_index
from imagesim.synth import make_delivery

def full_numpy(path):
    "the usual loop: decode, compare every pixel and band with zero"
    a = np.asarray(Image.open(path))
    n, all_ = np.count_nonzero((a==0).all(axis=2)), a.shape[0]*a.shape[1]
    return DATA_CLASSES[0 if n==0 else 2 if n==all_ else 1]

def full_grey(path):
    "the quickest full decode: brightness only, one comparison"
    a = np.asarray(Image.open(path).convert('L'))
    n = np.count_nonzero(a==0)
    return DATA_CLASSES[0 if n==0 else 2 if n==a.size else 1]

def ours(path): return chip_class(Path(path).read_bytes())

def speed(place, quick):
    ard = place.root/'ard'
    full_tile(ard, missing=True)
    chip_ard(ard, place.root/'chips/33', proc=1, keep_empty=True)
    store, folder = ChipStore(place.root/'chips/33'), place.root/'chips/33'
    ix = read_chip_index(store.indexes()[0])
    groups = {'chips as they come': ix['chip'], **{c: ix['chip'][data_class(ix['valid'])==c] for c in DATA_CLASSES}}
    rows = []
    for name,names in groups.items():
        paths = [f'{folder}/{n}' for n in names[::4 if quick else 1]]
        t = {fn.__name__: clock(lambda: [fn(p) for p in paths], repeat=3)[0] for fn in (full_numpy, full_grey, ours)}
        rows.append((f'{name} ({len(paths)})', *(f'{len(paths)/t[k]:,.0f}' for k in t), f'{t["full_numpy"]/t["ours"]:.1f} x', f'{t["full_grey"]/t["ours"]:.1f} x'))
    table('Judging jpgs, chips/s, one process', [('', 'full decode', 'full, grey only', 'imagesim', 'against full', 'against grey'), *rows])
    t1, s = clock(lambda: make_nodata_index(place.root/'a.json', folder, proc=1))
    t2, _ = clock(lambda: make_nodata_index(place.root/'b.json', folder, ard_path=ard, proc=1))
    t3, _ = clock(lambda: make_nodata_index(place.root/'a.json', folder, proc=1, update=True))
    n = s.extra['chips']
    table('The whole index', [('how','chips/s'), ('from the jpgs', f'{n/t1:,.0f}'), ('from the masks', f'{n/t2:,.0f}'), ('update, nothing new', f'{n/t3:,.0f}')])

def agreement(place, quick):
    sources = {}
    size = 6 if quick else 16
    for seed in (0,) if quick else (0, 1):
        make_delivery(place.root/f'syn{seed}', size=size, dates=2, seed=seed)
        sources[f'synthetic, seed {seed}'] = place.root/f'syn{seed}/ard'
    if SHARED.is_dir(): sources['Banepa'] = SHARED/'banepa/ard'
    for name,ard in sources.items():
        dest = place.fresh()
        chip_ard(ard, dest, proc=1, keep_empty=True)
        store = ChipStore(dest)
        truth = {}
        for p in store.indexes():
            ix = read_chip_index(p)
            truth.update(zip(ix['chip'], data_class(ix['valid']).tolist()))
        said = {n: ours(dest/n) for n in truth}
        counts = [[sum(truth[n]==a and said[n]==b for n in truth) for b in DATA_CLASSES] for a in DATA_CLASSES]
        table(f'{name}: {len(truth)} chips, {sum(truth[n]==said[n] for n in truth)/len(truth):.2%} agree', [('mask \\ rule', *DATA_CLASSES)]+[(a,*c) for a,c in zip(DATA_CLASSES,counts)])

if __name__=='__main__':
    args = parse(__doc__)
    with Workplace(args.folder) as place:
        speed(place, args.quick)
        agreement(place, args.quick)
