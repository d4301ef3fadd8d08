"""Millions of chips by 13 classes: distribution, correlation, co-occurrence and a dataset; time and peak memory of each, in a process of its own.

The issue asks for 2 million chips under 90 s and 1.5 GB on 2 cores, and no more memory for 4 million.
The chip index and the labels are generated cell by cell (not counted), on disk as a delivery would leave them; --folder says where.

    python benchmarks/bench_dataset.py [--quick] [--folder DIR]
"""
import json, os, resource, subprocess, sys, time
from multiprocessing import get_context
from pathlib import Path

from common import Workplace, parse, table

CELLS_A_ROW, DATES = 40, 2 # 2 dates of 1,024 places a cell

def cells(n:int)->list:
    "Cells side by side from the central meridian across the edge of zone 33, row by row; those beyond the edge are delivered in zone 34"
    from imagesim.ard import Cell
    return [Cell.from_xy(33, 2048+i%CELLS_A_ROW, 1060+i//CELLS_A_ROW, 12) for i in range(n)]

def generate(job):
    from imagesim.dataset import invent_delivery
    root, some = job
    return invent_delivery(root, some)

def deliver(root:Path, chips:int)->int:
    "Write so many chips; a copy of what is there is made longer"
    todo = cells(chips//(1024*DATES))
    with get_context('spawn').Pool(2) as pool: return sum(pool.map(generate, [(root, todo[i:i+10]) for i in range(0, len(todo), 10)], chunksize=1))

LOOKING = ('distribution', 'label_distribution'), ('correlation', 'label_correlation'), ('co-occurrence', 'label_cooccurrence')

def step(what:str, root:str):
    "What a process of its own measures"
    t = time.perf_counter()
    if what=='dataset':
        from imagesim.dataset import make_dataset
        d = make_dataset('bench', f'{root}/chips', f'{root}/labels', out=f'{root}/datasets', gap=1, max_empty=.1, caps={'class':dict(cropland=.3)}, weights={'class':'balanced'})
        said = f'{len(d):,} kept, level {d.manifest["block_level"]}'
        assert d.funnel.chips[:-1].sum()==len(d)
    elif what=='dataset, plain':
        from imagesim.dataset import make_dataset
        d = make_dataset('plain', f'{root}/chips', f'{root}/labels', out=f'{root}/datasets', min_valid=0., max_unmapped=1.)
        said = f'{len(d):,} kept, level {d.manifest["block_level"]}'
    elif what=='dataset, again':
        from imagesim.dataset import make_dataset
        d = make_dataset('plain', f'{root}/chips', f'{root}/labels', out=f'{root}/datasets', min_valid=0., max_unmapped=1.)
        assert not d.is_new
        said = 'is there'
    elif what=='verify':
        from imagesim.dataset import verify_dataset
        c = verify_dataset('plain', f'{root}/chips', out=f'{root}/datasets')
        assert c.ok
        said = 'whole'
    else:
        import imagesim.explore as explore
        path = next(Path(root).glob('datasets/plain/*/sparse.parquet'))
        r = getattr(explore, dict(LOOKING)[what])(str(path))
        said = f'{r.shape[0]} x {r.shape[1]}'
    seconds = time.perf_counter()-t
    high = int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])/1024
    use = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps(dict(seconds=seconds, cpu=use.ru_utime+use.ru_stime, peak=max(high, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss/1024), said=said)))

def measure(what:str, root:Path)->dict:
    run = subprocess.run([sys.executable, __file__, '--step', what, str(root)], capture_output=True, text=True, env={**os.environ, 'IMAGESIM_PROC':'2'})
    if run.returncode: raise SystemExit(f'{what}: {run.stderr[-2000:]}')
    return json.loads(run.stdout.splitlines()[-1])

def bench(root:Path, chips:int)->list:
    t = time.perf_counter()
    n = deliver(root, chips)
    took = time.perf_counter()-t
    steps = ['dataset, plain', 'dataset', 'dataset, again', 'verify']+[k for k,f in LOOKING if _has(f)]
    found = {s:measure(s, root) for s in steps}
    table(f'{n:,} chips x 13 classes (generated in {took:.0f} s)', [('', 'seconds', 'CPU s', 'chips/s', 'peak MB', ''), *((s, f'{r["seconds"]:.1f}', f'{r["cpu"]:.1f}', f'{n/r["seconds"]:,.0f}', f'{r["peak"]:,.0f}', r['said']) for s,r in found.items())])
    four = [found[s] for s in ('dataset', *(k for k,_ in LOOKING)) if s in found]
    print(f'  distribution, correlation, co-occurrence and a dataset: {sum(r["seconds"] for r in four):.0f} s, peak {max(r["peak"] for r in four):,.0f} MB')
    return [(s, r['peak']) for s,r in found.items()]

def _has(name):
    import imagesim.explore as explore
    return hasattr(explore, name)

if __name__=='__main__':
    if sys.argv[1:2]==['--step']:
        step(*sys.argv[2:4])
        sys.exit()
    args = parse(__doc__)
    sizes = (100_000, 200_000) if args.quick else (2_000_000, 4_000_000)
    peaks = []
    for chips in sizes:
        with Workplace(args.folder) as place: peaks.append(dict(bench(place.root, chips)))
    table('Peak MB by size', [('', *(f'{c:,}' for c in sizes)), *((s, *(f'{p[s]:,.0f}' for p in peaks)) for s in peaks[0])])
