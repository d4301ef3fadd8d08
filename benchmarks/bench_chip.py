"""Chips: splicing against decoding and encoding, against the copying of the same bytes; virtual chips; other levels; memory.

    python benchmarks/bench_chip.py [--quick] [--folder DIR]

Everything runs in one process unless said. All writers write to fresh folders of one file system, in turns, and the best of the turns counts.
"""
import io, os, shutil, subprocess, sys, warnings

from common import Workplace, clock, full_tile, parse, peak_mb, table

import numpy as np, rasterio
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning
from rasterio.windows import Window

from imagesim.chip import chip_ard
from imagesim.read import ChipStore, find_chips

warnings.simplefilter('ignore', NotGeoreferencedWarning)

def windows(px, rows): return [Window(c,r,px,px) for r in range(512, 512+rows*512, px) for c in range(512, 512+16384, px)]

def by_pillow(cog, dest, px, rows, quality=75):
    "(a) rasterio window, Pillow save"
    with rasterio.open(cog) as d:
        for i,w in enumerate(windows(px, rows)): Image.fromarray(np.moveaxis(d.read(window=w),0,-1)).save(f'{dest}/{i}.jpg', quality=quality)
    return i+1

def by_gdal(cog, dest, px, rows):
    "(b) rasterio's JPEG driver"
    with rasterio.open(cog) as d:
        for i,w in enumerate(windows(px, rows)):
            with rasterio.open(f'{dest}/{i}.jpg', 'w', driver='JPEG', width=px, height=px, count=3, dtype='uint8') as o: o.write(d.read(window=w))
    return i+1

def by_translate(cog, dest, px, rows):
    "(c) gdal_translate, a process a chip"
    for i,w in enumerate(windows(px, rows)[:40]):
        subprocess.run(['gdal_translate', '-q', '-of', 'JPEG', '-srcwin', *map(str,(w.col_off,w.row_off,px,px)), cog, f'{dest}/{i}.jpg'], check=True)
    return i+1

def by_copy(source, dest):
    "the limit: the same bytes into as many files"
    names = sorted(os.listdir(source))
    for n in names: shutil.copyfile(f'{source}/{n}', f'{dest}/{n}')
    return len(names)

def by_writing(blobs, dest):
    "a limit without reading: bytes in memory into as many files, plain open and write"
    for i,b in enumerate(blobs):
        with open(f'{dest}/{i}.jpg', 'wb') as f: f.write(b)
    return len(blobs)

def level17(place, cog, ard, quick):
    rows, turns = (1, 3) if quick else (8, 6)
    first = place.fresh()
    chip_ard(ard, first/'33', proc=1)
    source = first/'33'
    blobs = [(source/n).read_bytes() for n in find_chips(source)]
    rate = {}
    writers = {'imagesim chip_ard': lambda d: chip_ard(ard, d/'33', proc=1).extra['chips'], 'copy the jpgs (shutil.copyfile)': lambda d: by_copy(source, d),
               'write the same bytes from memory': lambda d: by_writing(blobs, d)}
    for _ in range(turns):
        for name,fn in writers.items():
            d = place.fresh()
            t, n = clock(fn, d)
            rate[name] = max(rate.get(name,0), n/t)
            place.used(d)
    for name,fn in (('(a) rasterio window + Pillow', by_pillow), ("(b) rasterio's JPEG driver", by_gdal)):
        t, n = clock(fn, cog, place.fresh(), 512, rows)
        rate[name] = n/t
    if shutil.which('gdal_translate'):
        t, n = clock(by_translate, cog, place.fresh(), 512, rows)
        rate['(c) gdal_translate -srcwin'] = n/t
    ours, a, copy = rate['imagesim chip_ard'], rate['(a) rasterio window + Pillow'], rate['copy the jpgs (shutil.copyfile)']
    table(f'Level 17, {len(blobs)} chips of {sum(map(len,blobs))/len(blobs)/1000:.0f} kB, one full tile', [('how','chips/s','ours is')]+[(k,f'{v:,.0f}',f'{ours/v:.2f} x') for k,v in rate.items()])
    print(f'  copying is {copy/a:.0f} x (a) here;  floor 40 x (a): {ours/a:.0f} x {"ok" if ours>=40*a else "MISSED"};  half of copying: {ours/copy:.2f} {"ok" if ours>=copy/2 else "MISSED"}')
    return source

def virtual(place, ard, source, quick):
    names = find_chips(source)
    rng = np.random.default_rng(0)
    order = rng.permutation(names).tolist()
    t_index, _ = clock(lambda: chip_ard(ard, place.fresh()/'33', proc=1, virtual=True), repeat=5)
    from functools import partial
    from imagesim.ard import find_tiles
    from imagesim.chip import ChipPlan, TileFacts, chip_tile
    tile = find_tiles(ard)[0]
    t_tile = min(clock(partial(chip_tile, (tile,TileFacts()), ChipPlan(str(d:=place.fresh()), str(d/'index'), virtual=True)))[0] for _ in range(9))
    v = place.fresh()
    chip_ard(ard, v/'33', proc=1, virtual=True)
    cogs, jpgs = ChipStore(v/'33'), ChipStore(source, index=place.fresh())
    def loose():
        for n in order:
            with open(f'{source}/{n}', 'rb') as f: f.read()
    repeat = 3 if quick else 9
    for s in cogs, jpgs: s.read(order) # warm
    rows = [(k, clock(fn, repeat=repeat)[0]) for k,fn in (('virtual: ChipStore.read from the COG', lambda: cogs.read(order)), ('loose: ChipStore.read from jpgs', lambda: jpgs.read(order)), ('loose: open and read, plain Python', loose))]
    table('Reading chips, warm, random order', [('how','chips/s','virtual is')]+[(k,f'{len(names)/t:,.0f}',f'{t/rows[0][1]:.2f} x') for k,t in rows])
    size = sum(p.stat().st_size for p in (v/'index').rglob('*.parquet'))
    print(f'  the index of one tile ({len(names)} chips): {1000*t_tile:.1f} ms with masks and parquet, {1000*t_index:.1f} ms as a whole run of chip_ard; {size/1024:.1f} bytes a chip, {1e7*size/1024/1e6:.0f} MB for ten million')

def level18(place, cog, ard, quick):
    rows = 2 if quick else 6
    rate = {}
    for _ in range(1 if quick else 2):
        t, s = clock(lambda: chip_ard(ard, place.fresh()/'33', zoom=18, proc=1))
        rate['imagesim chip_ard'] = max(rate.get('imagesim chip_ard',0), s.extra['chips']/t)
        t, n = clock(by_pillow, cog, place.fresh(), 256, rows)
        rate['(a) rasterio window + Pillow'] = max(rate.get('(a) rasterio window + Pillow',0), n/t)
    r = list(rate.values())
    table('Level 18', [('how','chips/s','ours is')]+[(k,f'{v:,.0f}',f'{r[0]/v:.2f} x') for k,v in rate.items()])
    print(f'  floor 1.5 x (a): {"ok" if r[0]>=1.5*r[1] else "MISSED"}')

def processes(place, cog, quick):
    "Spawned processes take seconds to start, so `chip_ard` uses them only where they pay; here they are forced, to show both"
    rows = []
    for zoom,k in ((17,2), (18,2)) if quick else ((17,2), (17,24), (18,2), (18,8)):
        ard = many(place, cog, k)
        forced = [timed(place, patched, ard, zoom, p) for p in (1,2)]
        asked = timed(place, chip_ard, ard, zoom, 2)
        rows.append((f'level {zoom}, {k} tiles', *(f'{t:.2f} s' for t in forced), f'{forced[0]/forced[1]:.2f} x', f'{asked:.2f} s'))
    table('Processes, start included', [('', 'one', 'two', 'speed-up', 'chip_ard(proc=2) as it chooses'), *rows])

def timed(place, fn, ard, zoom, proc):
    d = place.fresh()
    t = clock(fn, ard, d/'33', zoom, proc)[0]
    place.used(d)
    return t

def patched(ard, dest, zoom, proc):
    from unittest.mock import patch
    with patch('imagesim.chip._worth', lambda *a: proc): return chip_ard(ard, dest, zoom=zoom, proc=proc)

def many(place, cog, k):
    "A delivery of `k` tiles, all links to one"
    ard = place.fresh()
    for i in range(k):
        p = ard/'33'/cog.parent.parent.name/f'2021-05-{i+1:02}'/f'T{i:02}-visual.tif'
        p.parent.mkdir(parents=True)
        os.link(cog, p)
    return ard

MEMORY = 'import sys; from common import peak_mb; from imagesim.chip import chip_ard; chip_ard(sys.argv[1], sys.argv[2], zoom=int(sys.argv[3]), proc=1); print(peak_mb())'

def memory(place, cog, quick):
    rows = []
    for zoom in (17, 18, 15):
        counts = (1, 3) if quick or zoom!=17 else (1, 10)
        got = [float(subprocess.run([sys.executable, '-c', MEMORY, str(many(place, cog, k)), str(place.fresh()/'33'), str(zoom)], cwd=os.path.dirname(os.path.abspath(__file__)),
                                    capture_output=True, text=True, check=True).stdout) for k in counts]
        rows.append((f'level {zoom}', *(f'{m:.0f} MB ({k} tile{"s"*(k>1)})' for k,m in zip(counts, got)), 'ok' if max(got)<600 else 'MISSED'))
    table('Peak memory of one process, limit 600 MB', [('', 'one tile', 'more tiles', ''), *rows])

if __name__=='__main__':
    args = parse(__doc__)
    with Workplace(args.folder) as place:
        cog = full_tile(place.root/'ard')
        print(f'one tile of {cog.stat().st_size/1e6:.0f} MB, GDAL {rasterio.__gdal_version__}, Pillow {Image.__version__}, {os.cpu_count()} cores')
        source = level17(place, cog, place.root/'ard', args.quick)
        virtual(place, place.root/'ard', source, args.quick)
        level18(place, cog, place.root/'ard', args.quick)
        processes(place, cog, args.quick)
        memory(place, cog, args.quick)
