"""Labels of a dense cell: label_places against geopandas.overlay, and agreement of what they measure.

    python benchmarks/bench_labels.py [--quick] [--folder DIR]

The cell is a real square kilometre of Munich (Overpass), laid out 25 times. Both start from the same osm_data.json, each in a process of its own, so that peak memory can be told apart.
Seconds are of processor time (everything runs on one thread), so that other work on the machine doesn't count.
"""
import gzip, json, os, subprocess, sys, time
from pathlib import Path

from common import SHARED, Workplace, parse, peak_mb, table

def dense_cell(root, copies:int)->tuple:
    "Write the OSM file of a cell full of city; the number of its elements"
    import numpy as np
    from imagesim.ard import Cell
    from imagesim.element import osm_path, write_osm
    from pyproj import Transformer
    body = json.loads(gzip.open(SHARED/'overpass/munich_1km_union_down.json.gz').read())['elements']
    nodes = {e['id']:e for e in body if e['type']=='node'}
    cell = Cell.at(11.575, 48.137)
    to, back = Transformer.from_crs(4326, cell.epsg, always_xy=True), Transformer.from_crs(cell.epsg, 4326, always_xy=True)
    xy = np.column_stack(to.transform([n['lon'] for n in nodes.values()], [n['lat'] for n in nodes.values()]))
    middle, order = np.median(xy, axis=0), list(nodes)
    out = dict(nodes=[], ways=[], relations=[])
    side = int(copies**.5)
    for k in range(copies):
        at = np.array([cell.bounds.left, cell.bounds.bottom])+5000/side*(np.array([k%side, k//side])+.5)-middle
        far = (np.abs(xy-middle).max(1)>3000) # members of relations that lead out of town
        lonlat = np.column_stack(back.transform(*(xy+at).T)).round(7).tolist()
        pos, off = dict(zip(order, lonlat)), k*10**11
        for (i,n),p,f in zip(nodes.items(), lonlat, far):
            if not f or k==0: out['nodes'].append(dict(id=i+off, lon=p[0], lat=p[1], **({'tags':n['tags']} if n.get('tags') else {})))
        for e in body:
            tags = {'tags':e['tags']} if e.get('tags') else {}
            if e['type']=='way': out['ways'].append(dict(id=e['id']+off, nodes=[n+off for n in e['nodes']], geometry=[pos.get(n) for n in e['nodes']], **tags))
            if e['type']=='relation' and e.get('tags',{}).get('type')=='multipolygon':
                out['relations'].append(dict(id=e['id']+off, members=[dict(type=m['type'], ref=m['ref']+off, role=m['role']) for m in e['members']], **tags))
    write_osm(osm_path(root, cell), cell, out, dict(source='overpass'))
    return cell, sum(bool(e.get('tags')) for v in out.values() for e in v)

def features(root, cell):
    "what all start from"
    from imagesim.classes import read_schema
    from imagesim.element import osm_path
    from imagesim.feature import read_osm
    from imagesim.labels import PlaceGrid
    schema, gdf = read_schema('land13'), read_osm(osm_path(root, cell))
    return gdf, schema, PlaceGrid(cell), schema.match(gdf)

def complete(root, cell):
    "label_places from file to file: three sizes, cover, streets, states, times"
    from imagesim.labels import label_places, labels_path, read_labels
    t = time.process_time()
    run = label_places(root, 'land13', cell.zone, Path(root)/'labels', proc=1)
    t = time.process_time()-t
    assert run.done==1, run
    return t, read_labels(labels_path(Path(root)/'labels', 'land13', cell)), None

def ours(root, cell):
    "label_features: all but reading and writing"
    import pandas as pd
    from imagesim.labels import label_features
    gdf, schema, grid, hits = features(root, cell)
    t = time.process_time()
    L = label_features(gdf, schema, cell)
    return time.process_time()-t, pd.DataFrame(dict(place=[p.id for p in grid.places], **{c.name:v for c,v in zip(schema, L.measures[0])})), None

def measures(root, cell):
    "measure_classes alone"
    import pandas as pd
    from imagesim.labels import measure_classes
    gdf, schema, grid, hits = features(root, cell)
    t = time.process_time()
    m = measure_classes(schema, gdf, grid, hits)[0]
    return time.process_time()-t, pd.DataFrame(dict(place=[p.id for p in grid.places], **{c.name:v for c,v in zip(schema, m)})), int(hits.any(1).sum())

def overlaid(gdf, rows, places, metres):
    "cut features at places, unite what lies in one place, measure"
    import geopandas as gpd
    if not rows.any(): return 0.
    cut = gpd.overlay(gdf.loc[rows, ['geometry']], places, how='intersection', keep_geom_type=True)
    if not len(cut): return 0.
    whole = cut.dissolve('place')
    return (whole.length if metres else whole.area/places.geometry.iloc[0].area).reindex(places.place, fill_value=0.)

def overlay(root, cell, cover=False):
    "geopandas.overlay and dissolve, a class and size of place at a time; with `cover`, also what excludes each class"
    import geopandas as gpd, pandas as pd, shapely
    from imagesim.labels import trusted
    gdf, schema, grid, hits = features(root, cell)
    out, boxes = None, grid.boxes()
    t = time.process_time()
    for wider in (0, -10, 10):
        places = gpd.GeoDataFrame(dict(place=[p.id for p in grid.places]), geometry=shapely.box(*(shapely.bounds(boxes)+[-wider,-wider,wider,wider]).T), crs=gdf.crs)
        m = pd.DataFrame({c.name:overlaid(gdf, hits[:,i], places, c.measure=='metres') for i,c in enumerate(schema)}, index=places.place)
        out = m if out is None else out
    if cover:
        places, fine, no = places.set_geometry(boxes), trusted(gdf.geometry.to_numpy()), schema.excluders(gdf)
        for i in range(len(schema)): overlaid(gdf, no[:,i]&fine, places, False)
    return time.process_time()-t, out.reset_index(), None

def overlay_all(root, cell): return overlay(root, cell, True)

PARTS = dict(overlay=overlay, measures=measures, overlay_all=overlay_all, ours=ours, complete=complete)

def part(name, root, cell):
    "Run one part in a process of its own"
    from imagesim.ard import Cell
    seconds, got, n = PARTS[name](root, Cell.parse(cell))
    got.to_parquet(Path(root)/f'{name}.parquet')
    print(json.dumps(dict(seconds=seconds, mb=peak_mb(), features=n)))

def main(args):
    import pandas as pd
    if not SHARED.is_dir(): sys.exit('the benchmark needs the real data beside the project')
    with Workplace(args.folder) as place:
        cell, n = dense_cell(place.root, 4 if args.quick else 25)
        size = (place.root/f'{cell.zone:02d}'/cell.quadkey/'osm_data.json').stat().st_size/1e6
        runs = {}
        for name in PARTS:
            p = subprocess.run([sys.executable, __file__, '--part', name, str(place.root), cell.id], capture_output=True, text=True, env={**os.environ, 'PYTHONWARNINGS':'ignore'})
            if p.returncode: sys.exit(p.stderr)
            runs[name] = json.loads(p.stdout.strip().splitlines()[-1])
        names = pd.read_parquet(place.root/'overlay.parquet').set_index('place').sort_index()
        rows = [('', 'CPU s', 'ratio', 'peak MB', 'largest difference of a share, of metres')]
        titles = dict(overlay='measures, three sizes: geopandas.overlay', measures='measures, three sizes: measure_classes', overlay_all='measures and cover: geopandas.overlay',
            ours='measures, cover, streets, states, times: label_features', complete='… from file to file: label_places')
        lines = ['major_road', 'railway']
        for name,title in titles.items():
            r, peer = runs[name], runs['overlay' if name in ('overlay','measures') else 'overlay_all']
            off = (pd.read_parquet(place.root/f'{name}.parquet').set_index('place').sort_index()[names.columns].astype(float)-names).abs()
            rows.append((title, f'{r["seconds"]:.2f}', f'{peer["seconds"]/r["seconds"]:.1f} x', f'{r["mb"]:,.0f}', '' if name.startswith('overlay') else f'{off.drop(columns=lines).max().max():.0e}, {off[lines].max().max():.0e}'))
        table(f'A cell with {n:,} tagged elements, {runs["measures"]["features"]:,} of them in land13, {size:.0f} MB of JSON, one process', rows)

if __name__=='__main__':
    if '--part' in sys.argv: part(*sys.argv[sys.argv.index('--part')+1:])
    else: main(parse(__doc__))
