"""Map tiles of full ARD tiles: ours beside rio-tiler's mosaic reader on the same tiles in the same run.

A browser's view is 6 x 4 map tiles; several views a zoom, at random places. Cold: nothing open, nothing decoded (the files are in the system's cache for both).
Warm: the same map tiles again. rio-tiler gets the settings that titiler recommends, bilinear resampling, and the list of assets for nothing.

    python benchmarks/bench_tiles.py [--quick] [--folder DIR]
"""
import threading, time
from queue import Empty, SimpleQueue

from common import Workplace, full_tile, parse, peak_mb, table

import numpy as np, rasterio
from rasterio.enums import Resampling
from rio_tiler.errors import EmptyMosaicError
from rio_tiler.io import Reader
from rio_tiler.mosaic import mosaic_reader
from rio_tiler.mosaic.methods import FirstMethod
from rio_tiler.profiles import img_profiles

from imagesim.ard import Cell
from imagesim.mosaic import Mosaic, build_overviews, xyz_at

GDAL = dict(GDAL_DISABLE_READDIR_ON_OPEN='EMPTY_DIR', GDAL_CACHEMAX=256, CPL_VSIL_CURL_CACHE_SIZE=200_000_000, VSI_CACHE=True, VSI_CACHE_SIZE=5_000_000, GDAL_INGESTED_BYTES_AT_OPEN=32768)
CELLS = ['Z33-031311023120', 'Z33-031311023121', 'Z33-031311023122', 'Z33-031311023123']

def deliver(root, cells, second):
    "Full tiles with overviews; the second acquisition is behind a first one that leaves an edge out"
    for i,cell in enumerate(cells):
        for cat,day,missing in [('FIRST','2021-05-01',second), ('SECOND','2020-05-01',False)][:1+second]:
            p = full_tile(root, cat, day, cell, seed=i, missing=missing)
            with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True, GDAL_CACHEMAX=512, GDAL_TIFF_OVR_BLOCKSIZE=512, JPEG_QUALITY_OVERVIEW=75, PHOTOMETRIC_OVERVIEW='YCBCR'), rasterio.open(p, 'r+') as d:
                d.build_overviews([2,4,8,16,32], Resampling.average)

def views(m, z, n, rng, shape=(6,4)):
    "`n` views, as map tiles; where the ground is smaller than a view, what there is"
    b, out = m.bounds, []
    (x0,y0), (x1,y1) = xyz_at(b.west, b.north, z), xyz_at(b.east, b.south, z)
    for _ in range(n):
        x, y = (int(rng.uniform(lo, max(lo, hi-w))) for lo,hi,w in ((x0,x1,shape[0]),(y0,y1,shape[1])))
        out += [(i,j,z) for j in range(y, min(y+shape[1], int(y1)+1)) for i in range(x, min(x+shape[0], int(x1)+1))]
    return list(dict.fromkeys(out))

def run(fn, tiles, clients):
    "Let `clients` threads fetch all tiles: (seconds, ms of each)"
    todo, ms, lock = SimpleQueue(), [], threading.Lock()
    for t in tiles: todo.put(t)
    def work():
        while True:
            try: t = todo.get_nowait()
            except Empty: return
            a = time.perf_counter(); fn(*t); b = time.perf_counter()
            with lock: ms.append(1000*(b-a))
    threads = [threading.Thread(target=work) for _ in range(clients)]
    a = time.perf_counter()
    for t in threads: t.start()
    for t in threads: t.join()
    return time.perf_counter()-a, np.array(ms)

def theirs(m, fmt, resampling='bilinear'):
    "What serves a map tile with rio-tiler: the same assets in the same order"
    driver = dict(webp='WEBP', png='PNG', jpg='JPEG')[fmt]
    options = img_profiles.get(driver.lower())
    ranks = {p.number:r for p,r in zip(m.passes, m.ranks(_best()))}
    def read(asset, *xyz):
        with Reader(asset) as src: return src.tile(*xyz, tilesize=256, resampling_method=resampling, reproject_method=resampling)
    def tile(x, y, z):
        found = sorted({(ranks[p.number], p.squares[h[:3]].path) for h in m._hits(x,y,z) for p in m.at_square[h[:3]]})
        with rasterio.Env(**GDAL):
            try: img, _ = mosaic_reader([a for _,a in found], read, x, y, z, threads=0, pixel_selection=FirstMethod)
            except EmptyMosaicError: return b'' # nothing there, which a server would answer with an empty map tile
            return img.render(img_format=driver, **options)
    return tile

def _best():
    from imagesim.mosaic import check_selection
    return check_selection()

def measure(root, fmt, zooms, n, clients, overviews=None):
    rows, rng = [], np.random.default_rng(0)
    for z in zooms:
        for c in clients:
            m = Mosaic(root, overviews=overviews)
            tiles = views(m, z, n, rng)
            ours, other = lambda x,y,z: m.tile(x, y, z, format=fmt), theirs(m, fmt)
            run(lambda *t: Mosaic(root).tile(*t, format=fmt), tiles[:1], c); run(other, tiles[:1], c) # imports
            (tc,mc), (tw,mw) = run(ours, tiles, c), run(ours, tiles, c)
            (tr,mr), k = run(other, tiles, c), len(tiles)
            q = lambda v: f'{np.percentile(v,50):.1f} / {np.percentile(v,95):.1f}'
            rows.append((f'zoom {z}, {c} client{"s"*(c>1)}, {k} map tiles', f'{tr/tc:.1f} x', f'{tr/tw:.1f} x', f'{k/tr:.0f}', f'{k/tc:.0f}', f'{k/tw:.0f}', q(mr), q(mc), q(mw)))
            assert not m.faults, m.faults
    table(f'{fmt}{", with overviews" if overviews else ""}; ms are p50 / p95', [('', 'cold gain', 'warm gain', 'rio-tiler/s', 'cold/s', 'warm/s', 'rio-tiler ms', 'cold ms', 'warm ms'), *rows])

def parts(root, zooms):
    "Where the time of a map tile goes"
    import cProfile, pstats
    for z in zooms:
        m = Mosaic(root)
        tiles, p = views(m, z, 3, np.random.default_rng(1)), cProfile.Profile()
        p.enable()
        for t in tiles: m.tile(*t, format='webp')
        p.disable()
        s = pstats.Stats(p)
        at = {k:sum(v[3] for f,v in s.stats.items() if f[2]==k) for k in ('_cog','load','_warp','_sample','_encode')}
        print(f'  zoom {z}, cold, one map tile: '+', '.join(f'{name} {1000*at[k]/len(tiles):.2f} ms' for name,k in dict(open='_cog', decode='load', grid='_warp', resample='_sample', encode='_encode').items())+f'; all {1000*s.total_tt/len(tiles):.2f} ms')

def nearest(root, z, n):
    "rio-tiler as it comes, without smoothing, for one client"
    m = Mosaic(root)
    tiles = views(m, z, n, np.random.default_rng(2))
    t, ms = run(theirs(m, 'webp', 'nearest'), tiles, 1)
    ours, _ = run(lambda *o: m.tile(*o, format='webp'), tiles, 1)
    print(f'  rio-tiler with nearest resampling, zoom {z}, 1 client: {len(tiles)/t:.0f} map tiles/s, p50 {np.percentile(ms,50):.1f} ms; ours, bilinear, cold: {len(tiles)/ours:.0f}/s')

if __name__=='__main__':
    args = parse(__doc__)
    with Workplace(args.folder) as place:
        root = place.root/'ard'
        t = time.perf_counter()
        deliver(root, CELLS[:1] if args.quick else CELLS[:2], not args.quick)
        print(f'delivery made in {time.perf_counter()-t:.0f} s')
        if args.quick: measure(root, 'webp', (12,17), 1, (1,4))
        else:
            measure(root, 'webp', (12,13,14), 2, (1,8))
            measure(root, 'webp', (15,16,17,18), 2, (1,2,4,8))
            for fmt in ('jpg','png'): measure(root, fmt, (17,), 2, (1,))
            nearest(root, 17, 2)
        print(build_overviews(root, place.root/'mosaic'))
        measure(root, 'webp', (12,) if args.quick else (8,10,11,12,13), 2, (1,) if args.quick else (1,8), place.root/'mosaic')
        if not args.quick: parts(root, (12,14,16,17,18))
        print(f'  peak memory {peak_mb():.0f} MB')
