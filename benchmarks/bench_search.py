"""Nearest vectors: the exact scan and the quick index against FAISS itself and scikit-learn; filters; opening a schema; memory.

    python benchmarks/bench_search.py [--quick] [--folder DIR]
"""
import os, subprocess, sys, time
from pathlib import Path

THREADS = os.environ.get('IMAGESIM_BENCH_THREADS', '2')
for k in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS'): os.environ[k] = THREADS # `common` would say 1: search is measured as it is used

from common import Workplace, parse, table

import faiss, numpy as np
from sklearn.neighbors import NearestNeighbors

from imagesim.nearest import VectorIndex, cluster_vectors, exact_search

DIM, K = 128, 10
os.environ.pop('IMAGESIM_BENCH_THREADS', None)

def times(fn, queries, seconds=3., least=5)->np.ndarray: # ms of each call
    "Time single queries, another one each time"
    out, end, i = [], time.perf_counter()+seconds, 0
    fn(queries[:1])
    while (time.perf_counter()<end or i<least) and i<len(queries):
        t = time.perf_counter()
        fn(queries[i:i+1])
        out.append(1000*(time.perf_counter()-t)); i += 1
    return np.array(out)

def batch(fn, queries, repeat=2)->float: # Queries a second, the best of `repeat`
    best = float('inf')
    for _ in range(repeat):
        t = time.perf_counter(); fn(queries)
        best = min(best, time.perf_counter()-t)
    return len(queries)/best

def recall(truth, found)->float: return float(np.mean([len(set(a)&set(b))/len(a) for a,b in zip(truth.tolist(), found.tolist())]))

def ours_and_theirs(n, quick, bar):
    x = cluster_vectors(n, DIM, seed=0)
    queries = x[np.random.default_rng(1).choice(n, 500, replace=False)]+.05/np.sqrt(DIM)*np.random.default_rng(2).standard_normal((500,DIM)).astype('f4')
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    t = time.perf_counter()
    ix = VectorIndex.build(x, quick=True, bar=bar)
    built, card = time.perf_counter()-t, ix.card
    ix.filled()
    flat = faiss.IndexFlatIP(DIM); flat.add(x)
    bare, probes = ix.filled()[0], faiss.SearchParametersIVF(nprobe=card['probes'])
    again = faiss.IndexRefineFlat(bare, faiss.swig_ptr(x)) # the same second look, in FAISS
    looks = faiss.IndexRefineSearchParameters(k_factor=(2*K+10)/K, base_index_params=probes)
    sk = NearestNeighbors(n_neighbors=K, algorithm='brute', metric='cosine').fit(x)
    ways = {'exact scan': lambda q: exact_search(q, ix.rows, K)[1], 'FAISS flat': lambda q: flat.search(q, K)[1], 'scikit-learn': lambda q: sk.kneighbors(q)[1],
            'quick index': lambda q: ix.search(q, K, exact=False)[1], 'the same in FAISS alone': lambda q: again.search(q, K, params=looks)[1],
            'FAISS without the second look': lambda q: bare.search(q, K, params=probes)[1]}
    if not ix.serves:
        for name in list(ways)[3:]: del ways[name]
    truth, rows, base = ways['exact scan'](queries), [], None
    some = queries[:100]
    for name,fn in ways.items():
        ms = times(fn, queries, 1. if quick else 3.)
        rate = batch(fn, queries if name in list(ways)[3:] else some)
        base = base or (np.median(ms), rate)
        rows.append((name, f'{base[0]/np.median(ms):.2f} x', f'{rate/base[1]:.2f} x', f'{np.median(ms):.2f}', f'{np.percentile(ms,95):.2f}', f'{rate:,.0f}', f'{recall(truth, fn(queries)):.4f}'))
    table(f'{n:,} x {DIM}, {THREADS} threads; the exact scan is 1', [('', 'one query', 'in batches', 'p50 ms', 'p95 ms', 'queries/s', 'recall@10'), *rows])
    print(f"  index: {card['lists']} lists, {card['probes']} probed, bar {bar}, card says {card['recall']:.4f} ({card['low']:.4f} to {card['high']:.4f}); built in {built:.1f} s "
          f"(learn {card['seconds_train']:.1f}, code {card['seconds_code']:.1f}, measure {card['seconds_measure']:.1f}); codes {card['bytes']/1e6:.0f} MB")
    if ix.serves:
        both = np.array([(times(ways['quick index'], queries, .5), times(ways['the same in FAISS alone'], queries, .5)) for _ in range(1)], object)[0]
        print(f'  our own cost over FAISS alone: {np.median(both[0])-np.median(both[1]):+.3f} ms a query; {batch(ways["the same in FAISS alone"], queries)/batch(ways["quick index"], queries)-1:+.0%} in a batch of 500')
    filters(ix, queries, truth)

def filters(ix, queries, truth):
    rng, rows, n = np.random.default_rng(3), [], len(ix)
    for share in (.9, .5, .2, .05, .01, .001):
        mask = rng.random(n)<share
        exact, quick = times(lambda q: exact_search(q, ix.rows, K, mask), queries, 1.), times(lambda q: ix.search(q, K, mask), queries, 1.)
        a, b = (ix.search(queries[:100], K, mask, exact=e)[1] for e in (True, None))
        rows.append((f'{share:.1%}', f'{np.median(exact)/np.median(quick):.1f} x', f'{np.median(exact):.2f}', f'{np.median(quick):.2f}', f'{recall(a, b):.4f}', int((b>=0).sum(axis=1).min())))
    table('  filters: the share of rows allowed', [('', 'gain', 'exact p50 ms', 'as served p50 ms', 'recall@10', 'results at least'), *rows])

_serve = '''
import resource, sys, time, numpy as np
t0 = time.perf_counter()
from imagesim.similarity import open_schema
rss = lambda of='VmRSS': int(next(l for l in open('/proc/self/status') if l.startswith(of)).split()[1])/1024
t1 = time.perf_counter(); base = rss()
c = open_schema(sys.argv[1]).collection(); t2 = time.perf_counter()
names = c.rows['chip'].take(np.random.default_rng(0).integers(0, len(c), 1000)).to_pylist(); t3 = time.perf_counter()
at = c.find(names); t4 = time.perf_counter(); opened = rss()
q = c.vectors(at[:500])
t5 = time.perf_counter(); c.search(q[:1], 10, exact=False); t6 = time.perf_counter()
ms = []
for i in range(500):
    t = time.perf_counter(); c.search(q[i], 10, exact=False); ms.append(1000*(time.perf_counter()-t))
print(len(c), t2-t1, (t4-t3)/1000*1e6, t6-t5, np.median(ms), base, opened, rss('RssAnon'), rss('RssFile'), c.card['bytes']/1e6, c.card['recall'])
'''

def deployed(place, cells, bar):
    "Build a schema from files, open it in a fresh process, and look at time and memory"
    import orjson
    from imagesim.similarity import build_schema, make_embeddings
    b = place.root/'bundle'
    b.mkdir()
    (b/'weights.safetensors').write_bytes(b'none'); (b/'bundle.json').write_bytes(orjson.dumps(dict(name='none', hash='0'*64, dim=DIM)))
    make_embeddings(place.root/'emb', cells=cells, dates=1, side=32, dim=DIM)
    t = time.perf_counter()
    s = build_schema('x', b, place.root/'emb', root=place.root/'schemas', quick=True, bar=bar)
    built = time.perf_counter()-t
    p = subprocess.run([sys.executable, '-c', _serve, str(place.root/'schemas/x')], capture_output=True, text=True, cwd=Path(__file__).resolve().parent.parent)
    if p.returncode: return print(p.stderr)
    n, opened, find, fill, p50, base, after, own, mapped, codes, r = map(float, p.stdout.split())
    table(f'A schema of {n:,.0f} chips', [('','')]+[('build from files, s', f'{built:.1f}'), ('open, ms', f'{1000*opened:.1f}'), ('look up a chip by name, microseconds', f'{find:.1f}'), ('first quick search (loads the codes), s', f'{fill:.2f}'),
        ('one query, p50 ms', f'{p50:.2f}'), ('recall@10 on its card', f'{r:.4f}'), ('memory after import, MB', f'{base:.0f}'), ('after opening and 1000 look-ups, MB', f'{after:.0f}'), ('of its own after 500 queries, MB', f'{own:.0f}'),
        ('  mapped files beside it (vectors; the system takes them back when it needs to), MB', f'{mapped:.0f}'), ('codes, MB', f'{codes:.0f}'), ('1.4 x codes + 300, MB', f'{1.4*codes+300:.0f}')])

if __name__=='__main__':
    args = parse(__doc__)
    for n in ((50_000,) if args.quick else (100_000, 500_000, 1_000_000)): ours_and_theirs(n, args.quick, .98 if n>=1_000_000 else .95)
    with Workplace(args.folder) as place: deployed(place, 20 if args.quick else 977, .95)
