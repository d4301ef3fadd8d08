"""Training: killed and resumed, seeds, several processes, and inputs that are not as they should be."""
import json, math, os, shutil, signal, subprocess, sys, textwrap
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from PIL import Image

from imagesim.infra import CorruptError, InputError, MissingError, StorageError
from imagesim.loader import TrainingTable
from imagesim.loss import LossError
from imagesim.runs import Run, list_runs
from imagesim.train import evaluate, find_learning_rate, read_checkpoint, train

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(weights=None, backbone='tinynet', size=32, batch_size=8, epochs=2, loss='bce', patience=0, dropout=.3, workers=0)
pytestmark = pytest.mark.filterwarnings('ignore:.*RANDOM weights')

def make_pictures(folder, n=48, seed=0):
    "Noise with a red and a blue square, or without; two thirds to learn from"
    rng, rows = np.random.default_rng(seed), []
    (folder/'chips').mkdir(parents=True)
    for i in range(n):
        a, (red,blue) = rng.integers(0, 255, (48,48,3), dtype=np.uint8), rng.random(2)<.5
        if red: a[8:24,8:24] = 220,30,30
        if blue: a[24:40,24:40] = 30,30,220
        Image.fromarray(a).save(folder/'chips'/f'p{i:03d}.jpg')
        rows.append(dict(Feature=f'p{i:03d}.jpg', red=int(red), blue=int(blue), split='train' if i<2*n//3 else 'val'))
    pd.DataFrame(rows).to_csv(folder/'t.csv', index=False)
    return folder

def table(folder): return TrainingTable.from_csv(folder/'t.csv', split='split')
def go(folder, run='r', t=None, **kw): return train(table(folder) if t is None else t, run, chips=folder/'chips', out=folder/'models', **(dict(figures=False) | SMALL | kw))
def weights(run): return Path(run.path, 'weights.safetensors').read_bytes()
def numbers(run): return run.history.drop(columns='seconds')

@pytest.fixture(autouse=True)
def one_thread():
    "Sums in one order, whatever the machine"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture(scope='module')
def pictures(tmp_path_factory): return make_pictures(tmp_path_factory.mktemp('pictures'))

@pytest.fixture(scope='module')
def done(pictures):
    "A finished run, not to be changed"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield go(pictures, 'done', figures=True)
    torch.set_num_threads(n)

HANG = '''
import sys, time
sys.path.insert(0, {root!r})
import torch; torch.set_num_threads(1)
from imagesim.loader import TrainingTable
from imagesim.train import Task, train
step = Task.training_step
def slow(self, batch, i):
    if self.global_step=={at}:
        print('here', flush=True)
        time.sleep(600)
    return step(self, batch, i)
Task.training_step = slow
train(TrainingTable.from_csv({table!r}, split='split'), {run!r}, chips={chips!r}, out={out!r}, checkpoint_minutes=0, figures=False, **{settings!r})
'''

def killed_at(folder, run, at, **kw):
    "Train in a process of its own and kill it before step `at`"
    code = HANG.format(root=str(ROOT), at=at, table=str(folder/'t.csv'), run=run, chips=str(folder/'chips'), out=str(folder/'models'), settings=SMALL | kw)
    p = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline()=='here\n'
    p.send_signal(signal.SIGKILL)
    assert p.wait()==-signal.SIGKILL

@pytest.mark.parametrize('workers', [0, 1])
def test_killed_in_the_middle_of_an_epoch_and_resumed_it_is_the_same_run(pictures, done, workers):
    "Four steps an epoch: step 6 is in the middle of the second, after a best was kept"
    killed_at(pictures, f'killed{workers}', 6, workers=workers)
    r = Run(pictures/'models'/f'killed{workers}')
    assert not r.finished and 'not finished: 1 of 2 epochs' in repr(r)
    assert read_checkpoint(Path(r.path, 'checkpoints/last.ckpt'))['global_step']==6
    r = go(pictures, f'killed{workers}', workers=workers)
    pd.testing.assert_frame_equal(numbers(r), numbers(done), check_exact=True)
    assert {k:v for k,v in r.metrics.items() if k not in ('seconds','run')}=={k:v for k,v in done.metrics.items() if k not in ('seconds','run')}
    a, b = r.model().state_dict(), done.model().state_dict()
    assert all(torch.equal(a[k], b[k]) for k in b)

def test_a_finished_run_is_opened_not_trained_again(pictures, done):
    before = {p:p.stat().st_mtime_ns for p in Path(done.path).rglob('*') if p.is_file() and p.name!='.lock'}
    assert go(pictures, 'done').metrics==done.metrics
    assert {p:p.stat().st_mtime_ns for p in before}==before
    with pytest.raises(InputError, match='there is a run of that name'): go(pictures, 'done', resume=False)

def test_another_configuration_under_the_same_name_is_refused_with_the_difference(pictures, done):
    with pytest.raises(InputError, match=r'lr is 0.001 there, 0.002 asked'): go(pictures, 'done', lr=.002)
    t = table(pictures)
    t.split = np.where(np.arange(len(t))==0, 'val', t.split)
    with pytest.raises(InputError, match='dataset is .* there'): go(pictures, 'done', t)

def test_another_seed_gives_other_numbers(pictures, done):
    r = go(pictures, 'seed1', seed=1, epochs=1)
    assert abs(r.history.train_loss[0]-done.history.train_loss[0])>1e-4

def test_two_processes_train_one_network(pictures):
    r = go(pictures, 'two', devices=2)
    assert r.history.step.tolist()==[4,8] and r.config['devices']==2
    assert r.metrics['val']['rows']==16 # each chip of val once
    assert np.isfinite(r.history.select_dtypes('number').to_numpy()).all()
    with pytest.raises(InputError, match='a multiple of 2'): go(pictures, 'odd', devices=2, batch_size=7)

def test_a_loss_that_is_no_number_stops_and_names_step_rate_and_fix(pictures):
    with pytest.raises(LossError, match=r'at step [\d,]+ .*at a rate of .*best so far \(epoch 0.*checkpoints/best.ckpt.*another name with lr='):
        go(pictures, 'nan', lr=99., optimizer='sgd', clip_gradient=0, warmup=.9, freeze_epochs=0, epochs=30)
    best = read_checkpoint(pictures/'models/nan/checkpoints/best.ckpt')
    assert all(torch.isfinite(v).all() for v in best['state_dict'].values())
    assert not Run(pictures/'models/nan').finished

def test_batches_with_nothing_mapped_are_skipped_and_change_nothing(pictures):
    t = table(pictures)
    t.states[4:32] = -1 # four chips of train are left
    r = go(pictures, 'unmapped', t, batch_size=2, epochs=1)
    assert 12<=r.metrics['skipped_batches']<=14 and 'batches skipped' in repr(r)
    assert math.isfinite(r.history.train_loss[0])
    t.states[:4] = -1
    with pytest.raises(InputError, match='train: nothing is mapped'): go(pictures, 'nothing', t)

def test_a_class_without_positives_is_noted_and_left_out(pictures):
    t = table(pictures)
    t.states[:,0] = 0
    r = go(pictures, 'nored', t, epochs=1)
    assert any(n.startswith('train: no chip shows red') for n in r.metrics['notes'])
    assert math.isnan(r.class_table().ap['red']) and r.metrics['val']['map_macro']==pytest.approx(r.class_table().ap['blue'])
    assert 'no chip shows red' in Path(r.path, 'README.md').read_text()

def test_other_classes_and_foreign_checkpoints_are_refused(pictures, done):
    t = table(pictures).select(['blue','red'])
    with pytest.raises(InputError, match='trained on the classes red, blue; the table has blue, red'): evaluate(done, 'val', dataset=t)
    with pytest.raises(InputError, match="no split 'test'"): evaluate(done)
    killed = pictures/'models'/'foreign'
    go(pictures, 'foreign', t, epochs=1)
    (killed/'metrics.json').unlink()
    shutil.copy(Path(done.path, 'checkpoints/last.ckpt'), killed/'checkpoints/last.ckpt')
    with pytest.raises(InputError, match='checkpoint is of another classes: red, blue, where blue, red'): go(pictures, 'foreign', t, epochs=1)
    (killed/'checkpoints/last.ckpt').write_bytes(b'no checkpoint')
    with pytest.raises(CorruptError, match='not a readable checkpoint'): go(pictures, 'foreign', t, epochs=1)

def test_missing_chips_are_told_before_training(tmp_path):
    folder = make_pictures(tmp_path/'m', 24)
    for i in (3,20): (folder/'chips'/f'p{i:03d}.jpg').unlink()
    with pytest.raises(MissingError, match=r'2 of 24 chips are missing, such as p003.jpg .*nothing was trained'): go(folder)
    assert not (folder/'models/r/config.json').exists()

def test_unreadable_chips_are_masked_listed_and_make_the_exit_code_1(tmp_path):
    folder = make_pictures(tmp_path/'u', 24)
    for i in (3,20): (folder/'chips'/f'p{i:03d}.jpg').write_bytes(b'\xff\xd8 no picture')
    r = go(folder, epochs=1)
    assert sorted(r.unreadable)==['p003.jpg','p020.jpg'] and r.exit_code==1 and r.metrics['val']['rows_judged']==7
    assert '2 unreadable' in repr(r) and '2 chips could not be read' in Path(r.path, 'README.md').read_text()

def test_run_folder_says_everything(pictures, done):
    names = {str(p.relative_to(done.path)) for p in Path(done.path).rglob('*') if p.is_file()}
    assert {'config.json','dataset.json','versions.json','metrics.json','weights.safetensors','README.md','table.parquet','logs/metrics.csv','checkpoints/best.ckpt','checkpoints/last.ckpt',
            'figures/curves.png','figures/val-classes.png','figures/val-confusion.png','figures/val-precision-recall.png','figures/val-calibration.png'}<=names
    assert done.exit_code==0 and not [n for n in names if '/.' in n]
    v = json.loads(Path(done.path, 'versions.json').read_text())
    assert v['packages']['torch'] and 'commit' in v
    x = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    assert Run('done', out=pictures/'models').model()(x).shape==(2,2)
    t = list_runs(pictures/'models').set_index('run')
    assert t.state['done']=='finished' and t.val_map['done']==pytest.approx(done.metrics['val']['map_macro'])
    m = evaluate(done, 'val', tta=True)
    assert m['tta'] and m['rows']==16 and evaluate(done, 'val')['map_macro']==pytest.approx(done.metrics['val']['map_macro'])

def test_two_cannot_train_one_run_at_once(pictures, tmp_path):
    (tmp_path/'busy').mkdir()
    hold = f"import fcntl, sys; f = open({str(tmp_path/'busy/.lock')!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, '-c', hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline()=='held\n'
        with pytest.raises(StorageError, match='another process is training'): train(table(pictures), 'busy', chips=pictures/'chips', out=tmp_path, **SMALL)
        other.stdin.close()

@pytest.mark.parametrize('kw,why', [(dict(run='../x'), 'without a path'), (dict(epochs=0), 'epochs is 0'), (dict(lr=math.nan), 'lr is nan'), (dict(backbone='resnet19'), 'did you mean'),
    (dict(epoch=3), "did you mean 'epochs'"), (dict(weights=None, freeze_epochs=2), 'freeze_epochs needs weights'), (dict(devices='gpu'), 'devices is'), (dict(out='s3://b/models'), 'local folder'),
    (dict(loss='contrastive'), 'trains no classifier'), (dict(weights='nowhere.safetensors'), 'no such file of weights')])
def test_what_cannot_be_meant_is_refused_before_work(pictures, tmp_path, kw, why):
    kw = dict(run='bad', out=tmp_path/'models') | SMALL | kw
    with pytest.raises((InputError, MissingError), match=why): train(table(pictures), kw.pop('run'), chips=pictures/'chips', **kw)
    assert not (tmp_path/'models').exists()

def test_the_sweep_finds_a_rate_between_its_ends(pictures):
    s = find_learning_rate(table(pictures), chips=pictures/'chips', steps=30, low=1e-4, high=1., **{k:v for k,v in SMALL.items() if k!='epochs'})
    assert 1e-4<=s.suggestion<=1 and len(s.rates)==len(s.losses)==len(s.smooth)

def test_floor_4_trains_on_a_bare_gpu_machine(pictures, tmp_path):
    code = f'''
        import sys
        for name in ('rasterio','geopandas','shapely','pyproj','duckdb','maxar_ard_grid','osmium','faiss','fastapi','s3fs'): sys.modules[name] = None
        sys.path.insert(0, {str(ROOT)!r})
        import importlib, importlib.util
        floor = [m for m in ('loader','loss','model','augment','metrics','train','bundle','compress','encode') if importlib.util.find_spec('imagesim.'+m)]
        for m in floor: importlib.import_module('imagesim.'+m)
        from imagesim.loader import TrainingTable
        from imagesim.train import train
        r = train(TrainingTable.from_csv({str(pictures/'t.csv')!r}, split='split'), 'bare', chips={str(pictures/'chips')!r}, out={str(tmp_path)!r}, figures=False, **{SMALL | dict(epochs=1, batch_size=16)!r})
        print(r.metrics['steps'], len(floor))
    '''
    p = subprocess.run([sys.executable, '-W', 'ignore', '-c', textwrap.dedent(code)], capture_output=True, text=True, cwd=tmp_path, timeout=900)
    assert p.returncode==0, p.stderr[-2000:]
    steps, floor = map(int, p.stdout.split())
    assert steps==2 and floor>=6
