"""The server: map tiles a second over HTTP beside the same tiles made in this process, searches a second beside the bare index, memory over minutes of mixed requests.

    python benchmarks/bench_serve.py [--quick] [--folder DIR] [--minutes 5] [--clients 1,2,4,8]

The server is a process of its own; clients are processes too, with one kept connection each, and share the processors with it. Tiles lie over two acquisitions of a full cell. "cold": nobody asked for the tile before.
"""
import argparse, http.client, json, math, os, random, re, statistics, subprocess, sys, time
from collections import Counter
from multiprocessing import get_context
from pathlib import Path

from common import CELL, Workplace, full_tile, table

ROOT = Path(__file__).resolve().parent.parent

def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='less of everything: a look, not a measurement')
    p.add_argument('--folder', default='/dev/shm' if os.access('/dev/shm', os.W_OK) else None, help='where to work')
    p.add_argument('--minutes', type=float, help='of mixed requests; 5 when left out, 0.3 in the quick form')
    p.add_argument('--clients', default='1,2,4,8', help='how many ask at once')
    return p.parse_args()

def build(root:Path, cells:int):
    "A delivery of one full cell on two days, and a schema over made-up vectors, in a process that ends"
    from imagesim.bundle import make_bundle
    from imagesim.chip import chip_ard
    from imagesim.similarity import build_schema, make_embeddings
    for i,day in enumerate(('2019-05-09','2021-08-22')): full_tile(root/'ard', f'BENCH{i}', day, seed=i, missing=i==1)
    chip_ard(root/'ard', root/'chips', virtual=True, proc=1)
    b = make_bundle(dict(backbone='squeezenet1_0', size=64, weights='random'), root/'bundle')
    make_embeddings(root/'embeddings', cells, 1, side=32, dim=b.dim, encoder_hash=b.hash)
    build_schema('land', b, root/'embeddings', root=root/'schemas')

class Server:
    def __init__(self, root:Path):
        code = f'from imagesim.serve import run_server; run_server({str(root/"ard")!r}, ["land"], port=0, data_root={str(root)!r}, tell=lambda s: print(s, flush=True))'
        self.p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self.port = next(int(m[1]) for line in self.p.stdout if (m := re.search(r'open http://\S+?:(\d+)/', line)))
    def mb(self)->float: return int(re.search(r'VmRSS:\s+(\d+)', Path(f'/proc/{self.p.pid}/status').read_text())[1])/1024
    def __enter__(self): return self
    def __exit__(self, *e): self.p.terminate(); self.p.wait(20); self.p.stdout.close()

def fetch(port:int, requests:list)->list: # (status, seconds)
    "Ask one thing after another over one connection"
    c, out = http.client.HTTPConnection('127.0.0.1', port, timeout=60), []
    for path,body in requests:
        t = time.perf_counter()
        c.request('POST' if body else 'GET', path, body, {'content-type':'application/json'} if body else {})
        r = c.getresponse()
        r.read()
        out.append((r.status, time.perf_counter()-t))
    return out

def run(pool, port:int, requests:list, clients:int): # per second, p50 ms, p95 ms
    parts = [requests[i::clients] for i in range(clients)]
    start = time.perf_counter()
    answers = [a for part in pool.starmap(fetch, [(port, p) for p in parts]) for a in part]
    took = time.perf_counter()-start
    if bad := Counter(s for s,_ in answers if s!=200): raise SystemExit(f'unexpected answers: {dict(bad)}')
    ms = sorted(1000*s for _,s in answers)
    return len(answers)/took, statistics.median(ms), ms[int(.95*(len(ms)-1))]

def pixel(lon, lat, z):
    s = math.sin(math.radians(lat))
    return (lon/360+.5)*2**z, (.5-math.log((1+s)/(1-s))/(4*math.pi))*2**z

def tiles_of(box, z:int, n:int, rng)->list:
    "Addresses of tiles over the delivery, shuffled; all there are, or `n`"
    (x0,y1), (x1,y0) = pixel(box[0], box[1], z), pixel(box[2], box[3], z)
    found = [(z,x,y) for x in range(int(x0), int(x1)+1) for y in range(int(y0), int(y1)+1)]
    rng.shuffle(found)
    return found[:n]

def bench_tiles(server, pool, root, n, clients):
    from imagesim.mosaic import Mosaic
    rng, m = random.Random(0), Mosaic(root/'ard', chips=root/'chips')
    rows = [['zoom', 'tiles', 'in this process', *(f'{c} client{"s"*(c>1)}' for c in clients), 'p50 / p95 of 1', 'cold p95']]
    for z in (12, 14, 15, 16, 17, 18):
        at = tiles_of(m.bounds, z, n, rng)
        path = [(f'/tiles/{z}/{x}/{y}.webp', None) for z,x,y in at]
        cold = run(pool, server.port, path, 1)
        more = (path*math.ceil(n/len(path)))[:n]
        got = {c:run(pool, server.port, more, c) for c in clients}
        for z_,x,y in at: m.tile(x, y, z_, format='webp')
        t = time.perf_counter()
        for z_,x,y in at: m.tile(x, y, z_, format='webp')
        rows.append([z, len(at), f'{len(at)/(time.perf_counter()-t):.0f}', *(f'{got[c][0]:.0f}' for c in clients), f'{got[clients[0]][1]:.1f} / {got[clients[0]][2]:.1f} ms', f'{cold[2]:.1f} ms'])
    table('map tiles a second, 256 px WebP, warm', rows)

def bench_search(server, pool, root, n, clients):
    from imagesim.search import Searcher
    s = Searcher(str(root/'schemas/land'), chips=root/'chips')
    chips = s.view.texts('chip', random.Random(0).sample(range(len(s.view)), n))
    def rate(fn):
        fn(chips[0])
        t = time.perf_counter()
        for c in chips: fn(c)
        return f'{n/(time.perf_counter()-t):.0f}'
    asked = [('/api/search', json.dumps(dict(chip=c, k=20))) for c in chips]
    filtered = [('/api/search', json.dumps(dict(chip=c, k=20, where='clear>=0.5 and off_nadir<30'))) for c in chips]
    rows = [['', 'a second', 'p50 / p95'], ['the bare index', rate(lambda c: s.collection.search(s.collection.vectors(s.collection.find([c])), 20)), ''], ['Searcher.search, in this process', rate(lambda c: s.search(c, k=20)), '']]
    for what,qs in (('POST /api/search', asked), ('with two filters', filtered)):
        run(pool, server.port, qs[:4], 1)
        for c in clients:
            r = run(pool, server.port, qs, c)
            rows.append([f'{what}, {c} client{"s"*(c>1)}', f'{r[0]:.0f}', f'{r[1]:.1f} / {r[2]:.1f} ms'])
    table(f'searches among {len(s.view):,} chips of {s.collection.dim} numbers, k=20', rows)

def mixed(port:int, seconds:float, seed:int, box, chips:list)->Counter:
    "Ask for anything, for a while"
    rng, end, seen = random.Random(seed), time.monotonic()+seconds, Counter()
    while time.monotonic()<end:
        batch = []
        for _ in range(50):
            kind, z = rng.random(), rng.randrange(12, 20)
            x,y = (int(v) for v in pixel(rng.uniform(box[0],box[2]), rng.uniform(box[1],box[3]), z))
            batch.append((f'/tiles/{z}/{x}/{y}.{rng.choice(["webp","png","jpg"])}?size={rng.choice([256,256,512])}', None) if kind<.6 else
                         ('/api/search', json.dumps(dict(like=rng.sample(chips, 3), unlike=rng.sample(chips, 2), k=50))) if kind<.75 else
                         (f'/api/at?lon={rng.uniform(box[0],box[2])}&lat={rng.uniform(box[1],box[3])}', None) if kind<.85 else
                         (f'/api/grid?bbox={box[0]},{box[1]},{box[2]},{box[3]}&level=17', None) if kind<.86 else ('/api/config', None) if kind<.93 else (f'/nothing/{rng.random()}', None))
        seen += Counter(s for s,_ in fetch(port, batch))
    return seen

def bench_memory(server, pool, root, minutes:float):
    from imagesim.search import Searcher
    s, box = Searcher(str(root/'schemas/land'), chips=root/'chips'), None
    c = http.client.HTTPConnection('127.0.0.1', server.port); c.request('GET', '/api/config'); box = json.loads(c.getresponse().read())['bounds']; c.close()
    chips = s.view.texts('chip', random.Random(1).sample(range(len(s.view)), 100))
    part, rows, seen = minutes*60/6, [['minute', 'MB', 'requests', 'answers']], Counter()
    rows.append(['0.0', f'{server.mb():.0f}', '', ''])
    for i in range(6):
        now = sum(pool.starmap(mixed, [(server.port, part, 100*i+j, box, chips) for j in range(4)]), Counter())
        seen += now
        rows.append([f'{(i+1)*part/60:.1f}', f'{server.mb():.0f}', f'{now.total():,}', ', '.join(f'{n:,} x {k}' for k,n in sorted(now.items()))])
    table('memory of the server under mixed requests of 4 clients', rows)
    if odd := set(seen)-{200,404,503}: raise SystemExit(f'unexpected answers: {odd}')

def main():
    args = parse()
    clients = [int(c) for c in args.clients.split(',')]
    with Workplace(args.folder) as place:
        root, ctx = place.fresh(), get_context('spawn')
        p = ctx.Process(target=build, args=(root, 4 if args.quick else 64))
        p.start(); p.join()
        if p.exitcode: raise SystemExit('the data could not be made')
        with Server(root) as server, ctx.Pool(max(*clients, 4)) as pool:
            pool.starmap(fetch, [(server.port, [('/health', None)])]*len(clients))
            print(f'{os.cpu_count()} processors for the server and its clients; the server takes {server.mb():.0f} MB at the start')
            bench_tiles(server, pool, root, 100 if args.quick else 600, clients)
            bench_search(server, pool, root, 40 if args.quick else 400, [c for c in clients if c<=4])
            bench_memory(server, pool, root, args.minutes or (.3 if args.quick else 5))

if __name__=='__main__': main()
