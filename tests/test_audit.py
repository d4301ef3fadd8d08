"""The audit of an embedding against plain references, and wrong labels that were planted."""
import datetime

import numpy as np, pandas as pd, pyarrow as pa, pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

import imagesim.audit as A
from imagesim.audit import (Pictures, attends_to, cross_probs, error_sheet, label_errors, lay_out, near_duplicates, near_rows, neighbour_sheet, outliers, plot_attention, plot_space,
    space_sheet, spread_out, traits_of)
from imagesim.infra import InputError
from imagesim.nearest import cluster_vectors

@pytest.fixture(scope='module')
def vectors(): return cluster_vectors(120, 16, groups=5, seed=1)

@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0,4), min_size=2, max_size=25), st.integers(1,6), st.integers(0,99))
def test_neighbours_are_never_ones_own(own, k, seed):
    v = np.random.default_rng(seed).normal(size=(len(own),5))
    s, r = near_rows(v, k, own)
    u = v/np.linalg.norm(v, axis=1, keepdims=True)
    for i in range(len(own)):
        want = [j for j in np.argsort(-(u@u[i])) if own[j]!=own[i]][:k]
        assert r[i,:len(want)].tolist()==want and (r[i,len(want):]==-1).all() and (s[i,len(want):]==-np.inf).all()

def test_lonely_rows_come_first(vectors):
    v = vectors.copy(); v[33] = np.random.default_rng(9).normal(size=16)
    t = outliers(v, 5)
    u = v/np.linalg.norm(v, axis=1, keepdims=True); s = u@u.T; np.fill_diagonal(s, -9)
    np.testing.assert_allclose(t.set_index('row').distance.sort_index(), 1-np.sort(s, axis=1)[:,-5:].mean(1), atol=1e-5)
    assert t.row[0]==33
    twice = np.concatenate([v, v])
    assert outliers(twice, 5).distance.iloc[0]<outliers(twice, 5, np.tile(np.arange(120), 2)).distance.iloc[0]

def test_near_duplicates_across_blocks():
    rng = np.random.default_rng(0)
    v = rng.normal(size=(5000,12)).astype('f4'); v[4990] = 3*v[7]; v[2100] = v[7]; v[4000] = v[3999]
    t = near_duplicates(v, .99999)
    assert set(zip(t.a, t.b))=={(7,2100),(7,4990),(2100,4990),(3999,4000)} and t.group.nunique()==2 and (t.cosine<=1).all()
    place = np.arange(5000); place[4990] = 7
    assert set(zip(*near_duplicates(v, .99999, place)[['a','b']].T.to_numpy()))=={(7,2100),(2100,4990),(3999,4000)}
    u = v/np.linalg.norm(v, axis=1, keepdims=True)
    assert len(near_duplicates(v, .93))==np.triu(u@u.T>=.93, 1).sum()
    assert len(near_duplicates(np.eye(4), .5))==0

def test_shares_and_chance_agree_with_a_plain_count(vectors):
    rng = np.random.default_rng(2)
    place, trait, cell = np.tile(np.arange(60), 2), rng.choice(['a','b','c',None], 120), rng.integers(2, size=60)[np.tile(np.arange(60), 2)]
    t = attends_to(vectors, {'x':trait}, k=4, places=place, within=cell, draws=20).loc['x']
    u, share, chance = vectors/np.linalg.norm(vectors, axis=1, keepdims=True), [], []
    for i in range(120):
        may = [j for j in range(120) if place[j]!=place[i] and cell[j]==cell[i]]
        near = [trait[j] for j in sorted(may, key=lambda j: -(u[j]@u[i]))[:4] if trait[j]]
        pool = [trait[j] for j in may if trait[j]]
        if trait[i] and near: share.append(np.mean([x==trait[i] for x in near])); chance.append(np.mean([x==trait[i] for x in pool]))
    assert t.chips==len(share) and t['values']==3
    assert t.share==pytest.approx(np.mean(share)) and t.chance==pytest.approx(np.mean(chance))
    assert t.low<=t.share<=t.high and t.chance_low<=t.chance<=t.chance_high

def test_a_tint_of_tiles_is_found_and_within_a_cell_the_land_is_not():
    rng = np.random.default_rng(3)
    land, cell = rng.normal(size=(200,16)), np.repeat([0,1], 100)
    land[cell==1, 0] += 6 # another landscape
    place, both, tile = np.tile(np.arange(200), 2), np.tile(cell, 2), np.r_[cell, cell+2]
    plain = np.concatenate([land, land])+.3*rng.normal(size=(400,16))
    tint = plain+np.r_[np.zeros(200), np.full(200, 9.)][:,None]*np.eye(16)[3]
    a, b = (attends_to(v, {'tile':tile}, places=place).loc['tile'] for v in (plain, tint))
    c, d = (attends_to(v, {'tile':tile}, places=place, within=both).loc['tile'] for v in (plain, tint))
    assert a.lift>1.5 and c.chance_low<=c.share<=c.chance_high # the land alone, and nothing once it is the same land
    assert b.share>.8 and d.share>.8>d.chance_high and d.low>.75
    assert plot_attention({'plain':attends_to(plain, {'tile':tile}), 'tint':attends_to(tint, {'tile':tile})}).axes

def test_a_trait_that_nobody_knows_is_told_and_no_error(vectors):
    t = attends_to(vectors, {'sensor':[None]*120, 'one':['x']*120}, draws=5)
    assert t.chips['sensor']==0 and np.isnan(t.share['sensor']) and t.share['one']==t.chance['one']==1
    with pytest.raises(InputError, match="trait 'sensor' has 3 values"): attends_to(vectors, {'sensor':['a']*3})

def test_traits_of_tables():
    rows = pa.table(dict(chip=['Z33-03111112303003000_AB-1.jpg','Z33-03111112303003001_C_2.jpg','Z33-23111112303003001_C_2.jpg'], date=[datetime.date(2019,1,9), datetime.date(2021,8,22), None],
        off_nadir=pa.array([9.9,10.,None]), cell=['x']*3))
    tiles = pd.DataFrame(dict(cell=['Z33-031111123030'], catalog_id=['C_2'], sensor=['WV03']))
    t = traits_of(rows, tiles)
    assert t.tile.tolist()==['Z33-031111123030_AB-1','Z33-031111123030_C_2','Z33-231111123030_C_2'] and t.acquisition.tolist()==['AB-1','C_2','C_2']
    assert t.season.tolist()[:2]==['winter','summer'] and pd.isna(t.season[2]) and t.off_nadir.tolist()[:2]==['0 to 10','10 to 20'] and pd.isna(t.sensor[0]) and t.sensor[1]=='WV03'
    south = traits_of(pd.DataFrame(dict(chip=['Z33-23111112303003000_A.jpg'], date=['2020-07-01'])))
    assert south.season[0]=='winter'

def planted(y, rng, n=5):
    "Turn labels of 2 n places round, in both ways"
    y, out = y.copy(), {}
    for kind,state in (('unseen',0),('hole',1)):
        for i,j in rng.permutation(np.argwhere(y==state)):
            if sum(k==kind for k in out.values())<n and i not in {a for a,_ in out}: out[int(i),int(j)] = kind; y[i,j] = 1-y[i,j]
    return y, out

def test_planted_errors_of_an_invented_town_are_on_top():
    rng = np.random.default_rng(0)
    real = (rng.random((250,5))<[.5,.4,.25,.3,.12]).astype(float)
    y, wrong = planted(real, rng)
    v = np.concatenate([real@rng.normal(size=(5,30))+.5*rng.normal(size=(250,30))]*2)+.2*rng.normal(size=(500,30))
    place, twice = np.tile(np.arange(250), 2), np.tile(y, (2,1))
    t = label_errors(cross_probs(v, twice, places=place), twice, places=place, classes=list('abcde'))
    top = t.drop_duplicates('place').head(20)
    assert sum(wrong.get((p,'abcde'.index(c)))==k for p,c,k in zip(top.place, top['class'], top.kind))>=8
    assert not t.duplicated(['place','class']).any() and (t.dates==2).all() and (place[t.row]==t.place).all() and t.evidence.is_monotonic_decreasing
    for _,g in t.groupby(['class','kind']): assert g['rank'].tolist()==list(range(1, len(g)+1))

def test_planted_errors_of_a_synthetic_delivery():
    "The land and its truth; instead of a network, vectors that hold what stands in a place, with noise. It takes no painting"
    from imagesim.synth import Plan, check_spec, plan_acquisitions, truth_table
    from imagesim.land import Landscape
    plan = Plan(check_spec(14, 2, 5, 33, '031111123030', 1, None, False, False))
    land = Landscape(14, 5, 2, plan.extent)
    t = truth_table(plan, land, plan_acquisitions(2, 5, *plan.home.lonlat, False, None))
    least = dict(water=.1, forest=.2, grass=.3, cropland=.3, bare=.15, major_road=60, houses=.03, industry_retail=.1)
    first = t[t.catalog_id==t.catalog_id.iloc[0]]
    y, wrong = planted((first[list(least)]>=list(least.values())).to_numpy(float), np.random.default_rng(1))
    shown = np.sqrt(t[list(least)].to_numpy()/list(least.values())).clip(0, 2)
    rng = np.random.default_rng(2)
    v = shown@rng.normal(size=(len(least),40))+.4*rng.normal(size=(len(t),40))
    says = pd.DataFrame(y, first.place).loc[t.place].to_numpy()
    errors = label_errors(cross_probs(v, says, places=t.place), says, places=t.place.to_numpy(), classes=list(least))
    top, names = errors.drop_duplicates('place').head(20), first.place.tolist()
    assert sum((names.index(p), list(least).index(c)) in wrong for p,c in zip(top.place, top['class']))>=7

def test_predictions_on_training_chips_flatter():
    from sklearn.linear_model import LogisticRegression
    rng = np.random.default_rng(4)
    real = (rng.random((150,1))<.5).astype(float)
    y, wrong = planted(real, rng)
    v = real@rng.normal(size=(1,60))*.5+rng.normal(size=(150,60))
    heart = LogisticRegression(C=1e4, max_iter=3000).fit(v, y[:,0]).predict_proba(v)[:,1:]
    found = lambda p: sum((i,0) in wrong for i in label_errors(p, y).place.head(20))
    assert found(cross_probs(v, y))>found(heart)

def test_dates_are_averaged_and_must_agree():
    y, p = np.array([[1,0,1,0]*8], float).T, np.full((32,1), .5)
    place = np.arange(32)%16
    p[[1,17],0] = .9, .6 # absent on both dates
    t = label_errors(p, y, places=place)
    assert t.place[0]==1 and t.prob[0]==pytest.approx(.75) and t.row[0]==1 and t.dates[0]==2 and t.kind[0]=='hole' and t.evidence[0]==pytest.approx(np.log2(3))
    y[17] = 1
    t = label_errors(p, y, places=place)
    assert 1 not in t.place.tolist() and 'different labels' in t.attrs['notes'][0]
    y[17] = np.nan # unmapped on one date: the other decides
    t = label_errors(p, y, places=place, seen=np.arange(32)==1)
    assert t.place[0]==1 and t.dates[0]==1 and t.prob[0]==pytest.approx(.9) and bool(t.seen[0])

def test_few_places_and_nothing_known_are_noted():
    y = np.zeros((20,2)); y[:3,0] = 1; y[:,1] = np.nan
    t = label_errors(np.full((20,2),.5), y, classes=['rare','none'])
    assert len(t)==0 and [n.split(':')[0] for n in t.attrs['notes']]==['rare','none']
    assert error_sheet(t, Pictures(np.zeros((20,8,8,3),'u1'), px=16)).width>16
    assert np.isnan(cross_probs(np.random.default_rng(0).normal(size=(20,4)), y)[:,1]).all()

@pytest.mark.parametrize('probs,labels,say', [(np.full((9,2),1.5), np.zeros((9,2)), 'must be 0 to 1'), (np.zeros((9,2)), np.zeros((9,3)), 'must be the same'), (np.zeros((9,1)), np.full((9,1),.5), '0 or 1')])
def test_refuses_wrong_scores(probs, labels, say):
    with pytest.raises(InputError, match=say): label_errors(probs, labels)

@settings(max_examples=30, deadline=None)
@given(st.integers(1,60), st.integers(1,9), st.integers(0,99))
def test_each_square_shows_one_chip_that_lies_in_it(n, columns, seed):
    xy = np.random.default_rng(seed).random((n,2))
    rows, at = spread_out(xy, columns)
    assert len({tuple(a) for a in at})==len(rows)==len({tuple(a) for a in np.minimum((xy*columns).astype(int), columns-1)})
    assert (np.minimum((xy[rows]*columns).astype(int), columns-1)==at).all()

def test_pictures_from_anywhere_and_sheets(vectors, tmp_path):
    rng = np.random.default_rng(0)
    arrays = rng.integers(0, 255, (120,20,20,3), dtype=np.uint8)
    for i in range(119): Image.fromarray(arrays[i]).save(tmp_path/f'{i}.png')
    (tmp_path/'119.png').write_bytes(b'no picture')
    files = Pictures(tmp_path, [f'{i}.png' for i in range(120)], px=20)
    assert np.array_equal(files(5), arrays[5]) and np.array_equal(Pictures(arrays, px=20)(5), arrays[5]) and files(119).getpixel((0,0))==(0xd5,0xd9,0xde)
    for method in ('tsne','pca'):
        xy = lay_out(vectors, method)
        assert xy.shape==(120,2) and xy.min()==0 and xy.max()==1 and np.array_equal(xy, lay_out(vectors, method))
    sheet = np.asarray(space_sheet(xy, files, columns=12))
    assert sheet.shape==(10*22-2, 12*22-2, 3)
    tiles = {sheet[y*22:y*22+20, x*22:x*22+20].tobytes() for y in range(10) for x in range(12)}
    assert len(tiles)==120 # every chip, once
    assert neighbour_sheet(vectors, [1,2], files, k=4, places=np.arange(120)//2, groups=np.arange(120)%3).size==(20+24+4*26, 20+2*(20+34))
    plain = neighbour_sheet(vectors, [1,2], files, k=4)
    assert plain.size==(20+24+4*26, 20+2*(20+20)) and np.asarray(plain)[20,10].tolist()==[34,34,34] # the sample has a frame
    fig = plot_space(xy, np.arange(120)%25, files, columns=8)
    assert len(fig.axes)==2
    with pytest.raises(InputError, match="method is 'umap'"): lay_out(vectors, 'umap')

def test_a_long_name_stays_in_its_column():
    "Written smaller, and cut with dots where even that is too wide"
    import imagesim.audit as A
    from PIL import Image, ImageDraw
    for name in ('industry_retail', 'a name that nobody could read at this width'):
        im = Image.new('L', (200,40), 255)
        A._write(ImageDraw.Draw(im), (0,5), name, 11, 72, '#000')
        ink = np.flatnonzero((np.asarray(im)<200).any(0))
        assert 40<ink.max()<=72

def test_names_are_no_formulas(vectors, tmp_path):
    groups = np.array(['$x_{$', 'a$b$c'])[np.arange(120)%2]
    fig = plot_space(lay_out(vectors, 'pca'), groups, title='$ \\bad_{$', credit='$x_{$ $')
    fig.savefig(tmp_path/'a.png')
    fig = plot_attention({'$x_{$ $':attends_to(vectors, {'$x_{$ a $':groups}, draws=9)}, credit='$x_{$ $')
    fig.savefig(tmp_path/'b.png')
    assert fig.axes[0].get_yticklabels()[0].get_text()=='$x_{$ a $'
