"""From an extract to the OSM of all its cells: imagesim against osmium-tool and QuackOSM, speed and peak memory.

    python benchmarks/bench_osm.py [--quick] [--folder DIR] [--pbf FILE] [--quackosm PYTHON]

Every program runs in a process of its own, in turns, and the best turn counts. `--quackosm` names a Python that has it installed; osmium is the command of Debian's osmium-tool.
What is not installed is left out. (`osmium extract` with the cells as boxes would be the nearest relative, but with 18 boxes it took 16 GB: it keeps id sets for each.) The programs do not make the same thing, so read the ratios with the column that says what is written.
"""
import json, os, shutil, subprocess, sys, time
from importlib.util import find_spec
from pathlib import Path

from common import SHARED, Workplace, table

OURS = '''
import json, sys, time
sys.path.insert(0, sys.argv[4])
from imagesim.ard import Cell
from imagesim.element import osm_path, write_osm
from imagesim.extract import extract_cells
from imagesim.feature import cell_elements
pbf, folder, cells = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
t, clock = dict(walk=0., load=0., choose=0., write=0.), time.perf_counter
def lap(k, fn, *a):
    s = clock(); out = fn(*a); t[k] += clock()-s
    return out
found, n = lap('walk', extract_cells, pbf, cells, folder+'/spool'), 0
for c in found:
    e = lap('choose', cell_elements, lap('load', found.__getitem__, c), c)
    n += sum(map(len, e.values()))
    lap('write', write_osm, osm_path(folder+'/osm', c), c, e, dict(source='extract', extract=found.name))
print(json.dumps(dict(t, work=sum(t.values()), n=n)))
'''
WALK = OURS.split("for c in found")[0]+"print(json.dumps(dict(t, work=t['walk'], n=0)))"
QUACK = '''
import json, sys, time
import quackosm
t = time.perf_counter()
out = quackosm.convert_pbf_to_parquet(sys.argv[1], keep_all_tags=True, explode_tags=False, ignore_cache=True, working_directory=sys.argv[2]+'/files', result_file_path=sys.argv[2]+'/q.parquet', verbosity_mode='silent')
import pyarrow.parquet as pq
print(json.dumps(dict(work=time.perf_counter()-t, n=pq.read_metadata(out).num_rows)))
'''

def run(args)->dict: # seconds, MB, and what the program printed last as JSON
    "Run a program; `ru_maxrss` of that very process"
    t = time.perf_counter()
    p = subprocess.Popen([str(a) for a in args], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = p.stdout.read(), p.stderr.read()
    _, status, used = os.wait4(p.pid, 0)
    p.returncode = os.waitstatus_to_exitcode(status)
    if p.returncode: return dict(failed=err.decode().strip().splitlines()[-1][:200])
    said = json.loads(out.decode().splitlines()[-1]) if out.strip().endswith(b'}') else {}
    return dict(seconds=time.perf_counter()-t, mb=used.ru_maxrss/1024, **said)

def cells_of(pbf)->list:
    "Ids of the cells over the extract's bounds"
    import shapely
    from imagesim.ard import covering_cells
    from imagesim.extract import Extract
    return [c.id for c in covering_cells(shapely.box(*Extract(pbf).bounds))]

def copies(pbf, to, n):
    "Write `n` copies of an extract side by side into one: as large as a larger country, with the first copy where it was"
    import osmium
    from osmium.osm import NODE, RELATION, WAY
    step = 10**11
    with osmium.SimpleWriter(str(to), 2**22, osmium.FileProcessor(str(pbf)).header) as w:
        for kind in (NODE, WAY, RELATION):
            for k in range(n):
                for o in osmium.FileProcessor(str(pbf), kind):
                    if k==0: w.add(o)
                    elif kind==NODE: w.add_node(o.replace(id=o.id+k*step, location=(o.lon+.2*k, o.lat)))
                    elif kind==WAY: w.add_way(o.replace(id=o.id+k*step, nodes=[m.ref+k*step for m in o.nodes]))
                    else: w.add_relation(o.replace(id=o.id+k*step, members=[(m.type, m.ref+k*step, m.role) for m in o.members]))
    return to

def speed(place, pbf, turns, quack):
    cells, code, root = cells_of(pbf), {}, Path(__file__).resolve().parent.parent
    for k,v in dict(ours=OURS, walk=WALK, quack=QUACK).items():
        code[k] = place.root/f'{k}.py'
        code[k].write_text(v)
    mine = lambda k: lambda d: [sys.executable, code[k], pbf, d, json.dumps(cells), root]
    jobs = {'imagesim, whole way': (mine('ours'), 'a checked JSON a cell: all nodes, ways, relations'), 'imagesim, extract_cells': (mine('walk'), 'the spool: the same, as columns')}
    if tool := shutil.which('osmium'):
        jobs['osmium export'] = lambda d: [tool, 'export', pbf, '-o', d/'x.geojsonseq', '-f', 'geojsonseq'], 'GeoJSON, one file: tagged features, no untagged nodes, no relations but areas'
    else: print('osmium is not installed (Debian: osmium-tool); left out')
    if quack: jobs['QuackOSM'] = lambda d: [quack, code['quack'], pbf, d], 'GeoParquet, one file: tagged features'
    else: print('QuackOSM is not installed (name a Python that has it: --quackosm); left out')
    best = {}
    for _ in range(turns):
        for k,(args,_) in list(jobs.items()):
            folder = place.fresh()
            r = run(args(folder))
            place.used(folder)
            if 'failed' in r:
                if k.startswith('imagesim'): sys.exit(f'{k} failed: {r["failed"]}')
                print(f'{k} does not run here, left out: {r["failed"]}')
                del jobs[k]
            elif k not in best or r['seconds']<best[k]['seconds']: best[k] = r
    total, us = sum(count(pbf)), best['imagesim, whole way']
    rows = [(k, f'{r["seconds"]:.2f}', f'{r.get("work", r["seconds"]):.2f}', f'{total/r.get("work", r["seconds"]):,.0f}', f'{r["mb"]:,.0f}', f'{us["work"]/r.get("work", r["seconds"]):.2f}', jobs[k][1]) for k,r in best.items()]
    table(f'{Path(pbf).name}, {total:,} elements, {len(cells)} cells, best of {turns}',
        [('program', 'process s', 'without imports s', 'elements/s', 'peak MB', 'imagesim takes x times', 'writes'), *rows])
    table('Where imagesim spends it', [('step','s'), *((k, f'{us[k]:.2f}') for k in ('walk','load','choose','write')), ('elements written', f'{us["n"]:,}')])

def count(pbf)->list:
    "Nodes, ways and relations of an extract"
    import osmium
    from osmium.osm import NODE, RELATION, WAY
    return [sum(1 for _ in osmium.FileProcessor(str(pbf), k)) for k in (NODE, WAY, RELATION)]

def memory(place, pbf, sizes):
    "The same cells out of larger and larger extracts: seconds grow with the file, memory must not"
    cells, one, rows = cells_of(pbf), sum(count(pbf)), []
    for n in sizes:
        big = copies(pbf, place.root/f'{n}.osm.pbf', n) if n>1 else Path(pbf)
        for mb in (256, 0):
            d = place.fresh()
            p = [sys.executable, place.root/'walk_mb.py', big, d, json.dumps(cells), Path(__file__).resolve().parent.parent]
            (place.root/'walk_mb.py').write_text(WALK.replace("folder+'/spool')", f"folder+'/spool', {mb})"))
            r = run(p)
            place.used(d)
            rows.append((f'{n} x', f'{one*n:,}', f'{big.stat().st_size/1e6:.1f}', mb, f'{r["work"]:.2f}', f'{one*n/r["work"]:,.0f}', f'{r["mb"]:,.0f}'))
    table('Larger extracts, the same cells (positions in up to memory_mb/2, beyond it on disk)', [('copies','elements','MB','memory_mb','walk s','elements/s','peak MB'), *rows])

if __name__=='__main__':
    import argparse
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='one turn and no larger extracts: a look, not a measurement')
    p.add_argument('--folder', default='/dev/shm' if os.access('/dev/shm', os.W_OK) else None, help='where to work: memory when left out')
    p.add_argument('--pbf', default=str(SHARED/'osm/liechtenstein-2022.osm.pbf'), help='the extract; needs bounds in its head')
    p.add_argument('--quackosm', default=sys.executable if find_spec('quackosm') else None, help='a Python that has QuackOSM')
    args = p.parse_args()
    if not os.path.isfile(args.pbf): sys.exit(f'{args.pbf} is not there; name an extract with --pbf')
    with Workplace(args.folder) as place:
        speed(place, args.pbf, 1 if args.quick else 4, args.quackosm)
        if not args.quick: memory(place, args.pbf, (1, 2, 6))
