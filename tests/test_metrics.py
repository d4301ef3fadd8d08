"""The numbers against scikit-learn and against slow ones written out; what never counts, what is undefined, what is refused."""
import json, math

import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from sklearn.metrics import average_precision_score, f1_score, precision_recall_fscore_support, roc_auc_score

from imagesim.infra import CorruptError, InputError, read_json, write_json
from imagesim.metrics import (apply_temperature, average_precision, bootstrap_map, calibration, check_scores, choose_thresholds, class_confusion, class_table, f1_scores, fit_temperature,
    multilabel_metrics, plot_calibration, plot_classes, plot_confusion, plot_curves, plot_precision_recall, ranking, read_log, roc_auc)

def invent(n=200, c=5, seed=0, levels=None, mapped=.8, dtype=np.float64):
    r = np.random.default_rng(seed)
    y = r.random((n,c))<r.uniform(.1,.6,c)
    p = 1/(1+np.exp(-(2*y-1+r.normal(0,1.5,(n,c)))))
    if levels: p = np.round(p*levels)/levels
    return p.astype(dtype), y, r.random((n,c))<mapped

some = settings(max_examples=40, deadline=None)
seeds, levels = st.integers(0,10**6), st.sampled_from([None,1,3,20])

@some
@given(seeds, levels, st.sampled_from([np.float64,np.float32,np.float16]), st.integers(2,80))
def test_ranked_measures_equal_scikit_learn(seed, lv, dtype, n):
    p, y, _ = invent(n, 1, seed, lv, dtype=dtype)
    p, y = p[:,0], y[:,0]
    if y.all() or not y.any():
        assert math.isnan(average_precision(p, y)) and math.isnan(roc_auc(p, y))
        return
    assert average_precision(p, y)==pytest.approx(average_precision_score(y, p), abs=1e-12)
    assert roc_auc(p, y)==pytest.approx(roc_auc_score(y, p), abs=1e-12)

@pytest.mark.parametrize('p', [[0.,-0.,0.,1.], [1.,1.,1.,1.], [5e-324,0.,1e-310,1.], [.5,np.nextafter(.5,0),np.nextafter(.5,1),.5]])
def test_ranking_at_the_ends_of_the_range(p):
    y = np.array([True,False,False,True])
    r = ranking(p, y)
    for s,right,taken in zip(*r): assert right==(y&(np.array(p)>=s)).sum() and taken==(np.array(p)>=s).sum()
    assert len(r.score)==len(np.unique(np.abs(p))) and average_precision(p, y)==pytest.approx(average_precision_score(y, p), abs=1e-12)

def test_the_list_that_came_in_is_left_alone():
    p, y, m = invent(); a = p.copy(), y.copy(), m.copy()
    multilabel_metrics(p, y, m, places=np.arange(200)//2, draws=3); choose_thresholds(p, y, m); class_confusion(p, y, m)
    for u,v in zip(a, (p,y,m)): assert np.array_equal(u, v)

@some
@given(seeds, levels, st.floats(.05,.95))
def test_counts_equal_scikit_learn(seed, lv, t):
    p, y, _ = invent(60, 4, seed, lv)
    f, said = f1_scores(p, y, thresholds=t), p>=t
    pr, rc, f1, n = precision_recall_fscore_support(y, said, zero_division=np.nan)
    judged = y.any(0)&~y.all(0)
    assert f['recall']==pytest.approx(rc, nan_ok=True) and f['precision']==pytest.approx(pr, nan_ok=True)
    assert f['f1_macro']==pytest.approx(f1_score(y, said, average=None, zero_division=0)[judged].mean() if judged.any() else math.nan, nan_ok=True)
    assert f['f1_micro']==pytest.approx(f1_score(y, said, average='micro', zero_division=np.nan), nan_ok=True)
    assert f['f1_samples']==pytest.approx(f1_score(y, said, average='samples', zero_division=1))

@some
@given(seeds)
def test_unmapped_cells_never_count(seed):
    p, y, m = invent(80, 4, seed, mapped=.6)
    r = np.random.default_rng(seed)
    q, z = np.where(m, p, r.random(p.shape)), np.where(m, y, r.random(y.shape)<.5)
    places = np.arange(80)//2
    assert str(multilabel_metrics(p, y, m, thresholds=[.3]*4, places=places, draws=5))==str(multilabel_metrics(q, z, m, thresholds=[.3]*4, places=places, draws=5))
    assert np.array_equal(choose_thresholds(p, y, m)[0], choose_thresholds(q, z, m)[0]) and fit_temperature(p, y, m)==fit_temperature(q, z, m)
    a, b = class_confusion(p, y, m), class_confusion(q, z, m)
    assert all(np.array_equal(a[k], b[k]) for k in a)
    assert str(multilabel_metrics(p, np.where(m, y, np.nan)))==str(multilabel_metrics(p, y, m)) # NaN is not mapped
    each = [average_precision_score(y[m[:,j],j], p[m[:,j],j]) for j in range(4) if 0<y[m[:,j],j].mean()<1]
    assert multilabel_metrics(p, y, m)['map_macro']==pytest.approx(np.mean(each))

def test_a_chip_without_labels_counts_by_what_is_said_of_it():
    y = [[0,0],[0,0],[1,0],[1,0]]
    said = [[.1,.1],[.9,.1],[.9,.1],[.9,.9]]
    assert f1_scores(said, y)['f1_samples']==pytest.approx((1+0+1+2/3)/4)
    m = np.array([[1,1],[0,0],[1,1],[1,1]], bool) # a chip of which nothing is mapped doesn't count
    assert f1_scores(said, y, m)['f1_samples']==pytest.approx((1+1+2/3)/3)
    assert multilabel_metrics(said, y, m)['rows_judged']==3

def test_the_threshold_itself_is_a_yes(): assert f1_scores([[.35],[.34]], [[1],[0]])['f1_micro']==1

def test_classes_that_can_not_be_judged_are_nan_left_out_and_named():
    p, y, m = invent(100, 4, mapped=1)
    y[:,1], y[:,2] = False, True
    m[:,3] = False
    d = multilabel_metrics(p, y, m, ['a','b','c','d'])
    t = class_table(d)
    assert t.ap.isna().tolist()==[False,True,True,True] and d['map_macro']==t.ap['a'] and d['f1_macro']==t.f1['a']
    assert [n.split(';')[0] for n in d['notes']]==['b: no positives among 100', 'c: no negatives among 100', 'd: nothing is mapped']
    assert math.isnan(t.recall['b']) and t.recall['c']>0 and math.isnan(t.prevalence['d'])

def test_nothing_mapped_at_all_is_nan_everywhere_and_no_error():
    p, y, m = invent(10, 3)
    d = multilabel_metrics(p, y, m&False, places=range(10))
    assert all(math.isnan(d[k]) for k in ('map_macro','map_micro','f1_samples','f1_macro','f1_micro','ece','map_macro_low')) and len(d['notes'])==3
    assert multilabel_metrics(p[:0], y[:0], m[:0])['rows']==0
    assert fit_temperature(p, y, m&False)==1

def test_metrics_are_plain_and_fit_a_json_file(tmp_path):
    p, y, m = invent(dtype=np.float32); y[:,0] = False
    d = multilabel_metrics(p, y, m, thresholds=choose_thresholds(p, y, m)[0], places=[f'p{i//2}' for i in range(200)], draws=5)
    json.dumps(d)
    write_json(tmp_path/'metrics.json', d)
    back = read_json(tmp_path/'metrics.json')
    assert back['map_macro']==d['map_macro'] and back['per_class'][0]['ap'] is None
    assert set(d)=={'rows','rows_judged','cells','map_macro','map_micro','f1_samples','f1_macro','f1_micro','f1_samples_chosen','f1_macro_chosen','f1_micro_chosen','map_macro_low','map_macro_high','ece','threshold','per_class','notes'}
    assert list(d['per_class'][0])==['class','support','known','prevalence','ap','auc','precision','recall','f1','threshold']

@some
@given(seeds, levels)
def test_chosen_thresholds_are_the_best_there_are(seed, lv):
    p, y, m = invent(120, 3, seed, lv)
    t, notes = choose_thresholds(p, y, m, least=1)
    best = f1_scores(p, y, m, t)['f1']
    for j in range(3):
        if not 0<y[m[:,j],j].mean()<1: continue
        for s in np.unique(p[:,j]): assert best[j]>=f1_scores(p, y, m, s)['f1'][j]-1e-12
    assert ((0<=t)&(t<=1)).all()

def test_few_positives_keep_the_default_and_are_named():
    p, y, m = invent(100, 3, mapped=1)
    y[:,1] = np.arange(100)<9
    y[:,2] = np.arange(100)>=9
    t, notes = choose_thresholds(p, y, m, ['a','b','c'], default=.4)
    assert t[0]!=.4 and t[1:].tolist()==[.4,.4] and len(notes)==1 and notes[0].startswith('the threshold stays 0.4') and 'b (9 and' in notes[0]

def test_calibration_against_a_slow_one():
    p, y, m = invent(500, 3)
    p[0,0], p[1,0], m[:2,0] = 0, 1, True # both ends belong to a bin
    c, q, t = calibration(p, y, m, 10), p[m], y[m]
    slow = sum(abs(q[k].mean()-t[k].mean())*k.mean() for i in range(10) if (k := (q>=i/10)&((q<(i+1)/10)|(i==9))).any())
    assert c['ece']==pytest.approx(slow) and c['cells'].sum()==m.sum() and c['brier']==pytest.approx(((q-t)**2).mean())

@pytest.mark.parametrize('true', [.4,1.,3.])
def test_a_temperature_is_found_again(true):
    r = np.random.default_rng(0)
    z = r.normal(0, 2, (20000,3)); y = r.random(z.shape)<1/(1+np.exp(-z))
    p = 1/(1+np.exp(-z*true)) # too sure by a factor
    T = fit_temperature(p, y)
    assert T==pytest.approx(true, rel=.05)
    assert calibration(apply_temperature(p, T), y)['ece']<.01
    assert average_precision(apply_temperature(p[:,0], T), y[:,0])==pytest.approx(average_precision(p[:,0], y[:,0]), abs=1e-4)

def test_a_temperature_stands_certainty():
    T = fit_temperature([[0.],[1.],[1.],[0.]], [[0],[1],[0],[1]])
    assert np.isfinite(T) and np.isfinite(apply_temperature([0,1], T)).all()
    with pytest.raises(InputError, match='above 0'): apply_temperature([.5], 0)

def test_confusion_against_a_slow_one():
    p, y, m = invent(150, 4)
    c, said = class_confusion(p, y, m, thresholds=[.3,.4,.5,.6]), (p>=[.3,.4,.5,.6])
    for i in range(4):
        missed = m[:,i]&y[:,i]&~said[:,i]
        assert c['missed'][i]==missed.sum() and c['instead'][i,i]==0
        for j in range(4): assert c['instead'][i,j]==(missed&m[:,j]&said[:,j]&~y[:,j]).sum()
        assert c['nothing'][i]==sum(not any(m[k,j] and said[k,j] and not y[k,j] for j in range(4)) for k in np.flatnonzero(missed))

def test_bootstrap_draws_places_whole():
    p, y, m = invent(300, 3)
    alone = bootstrap_map(p, y, m)
    assert alone['low']<alone['map_macro']<alone['high'] and alone['map_macro']==pytest.approx(multilabel_metrics(p, y, m)['map_macro'])
    twice = [np.concatenate([a]*4) for a in (p,y,m)] # four dates that look alike add nothing
    places = np.tile(np.arange(300), 4)
    by_place = bootstrap_map(*twice, places)
    assert by_place['low']==pytest.approx(alone['low']) and by_place['high']==pytest.approx(alone['high'])
    wrong = bootstrap_map(*twice)
    assert wrong['high']-wrong['low']<.7*(alone['high']-alone['low'])
    assert bootstrap_map(p, y, m, seed=1)['low']!=alone['low'] and str(bootstrap_map(p, y, m))==str(alone)

def test_bootstrap_equals_copying_rows():
    p, y, m = invent(60, 2, levels=5)
    draw = np.random.default_rng(0).integers(60, size=60)
    once = bootstrap_map(p, y, m, draws=1)
    want = np.mean([average_precision_score(y[draw][m[draw,j],j], p[draw][m[draw,j],j]) for j in range(2)])
    assert once['low']==pytest.approx(want)==once['high']

@pytest.mark.parametrize('change, say', [
    (lambda p,y,m: (p[0],y,m), r'need \(chips, classes\)'), (lambda p,y,m: (p,y[:5],m), 'labels have shape'), (lambda p,y,m: (p,y,m[:,:2]), 'mask have shape'),
    (lambda p,y,m: (np.where(p>.5,np.nan,p),y,m), 'are NaN'), (lambda p,y,m: (p*1.5,y,m), '0 to 1'), (lambda p,y,m: (p-.5,y,m), 'take the sigmoid'), (lambda p,y,m: (np.full_like(p,np.inf),y,m), '0 to 1'),
    (lambda p,y,m: (p,y*2,m), 'they are 0 or 1'), (lambda p,y,m: (p,y,m*2), 'mask holds 2'), (lambda p,y,m: (p,np.where(y,np.nan,0.),m), 'they are 0 or 1')])
def test_what_can_not_be_measured_is_refused(change, say):
    for fn in (check_scores, multilabel_metrics, f1_scores, choose_thresholds, calibration, class_confusion, bootstrap_map, fit_temperature):
        with pytest.raises(InputError, match=say): fn(*change(*invent(mapped=1)))

def test_names_thresholds_and_places_must_fit():
    p, y, m = invent()
    with pytest.raises(InputError, match='2 names of classes for 5'): multilabel_metrics(p, y, m, ['a','b'])
    with pytest.raises(InputError, match='there are 5 classes'): multilabel_metrics(p, y, m, thresholds=[.5]*4)
    with pytest.raises(InputError, match='there are 200 rows'): bootstrap_map(p, y, m, range(5))

def test_figures_stand_empty_and_single_classes(tmp_path):
    p, y, m = invent(60, 3)
    for y_, m_ in ((y|[False,True,False],m), (y,m&False)):
        for fig in (plot_classes(multilabel_metrics(p,y_,m_), {'0':'#ff0000'}), plot_precision_recall(p,y_,m_), plot_calibration(p,y_,m_,temperature=2.), plot_confusion(class_confusion(p,y_,m_))): fig.savefig(tmp_path/'f.png')
    plot_precision_recall(p[:,:1], y[:,:1], m[:,:1], ['only'], credit='© someone').savefig(tmp_path/'f.png')
    plot_confusion(class_confusion(p[:,:1], y[:,:1], m[:,:1])).savefig(tmp_path/'f.png')

@pytest.mark.parametrize('columns', [['train_loss'], ['train_loss_step','train_loss_epoch'], ['val_map_macro'], ['lr-AdamW/pg1','lr-AdamW/pg2'], ['val_loss','val_f1_samples','lr'], ['train_loss','val_loss','val_map_macro','val_map_micro','lr']])
def test_learning_curves_take_what_there_is(tmp_path, columns):
    t = pd.DataFrame({'epoch':np.repeat(range(3),2), 'step':range(6)}|{c:np.where(np.arange(6)%2==i%2, .5, np.nan) for i,c in enumerate(columns)})
    t.to_csv(tmp_path/'metrics.csv', index=False)
    plot_curves(tmp_path/'metrics.csv').savefig(tmp_path/'f.png')
    plot_curves(read_log(tmp_path/'metrics.csv').drop(columns='epoch')).savefig(tmp_path/'f.png')

def test_learning_curves_of_what_is_none(tmp_path):
    f = tmp_path/'metrics.csv'
    for text in ('', 'a,b\n1,2\n', '\x00\xff'):
        f.write_text(text)
        with pytest.raises(CorruptError): plot_curves(f)
    f.write_text('epoch,step,note\n0,1,x\n')
    with pytest.raises(InputError, match='nothing to draw'): plot_curves(f)
    with pytest.raises(FileNotFoundError): plot_curves(tmp_path/'none.csv')

def test_curves_are_read_from_a_bucket(bucket):
    from imagesim.infra import write_bytes
    write_bytes(f'{bucket}/logs/metrics.csv', b'epoch,step,val_map_macro\n0,1,.5\n1,2,.6\n')
    assert len(plot_curves(f'{bucket}/logs/metrics.csv').axes)==1
