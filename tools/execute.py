"""Run notebooks from a fresh kernel and save their outputs: `python tools/execute.py [--slow] [nbs/00_infra.ipynb ...]`.

Without names, every notebook is run; with --slow, its slow cells too. Afterwards they are cleaned and exported, so what is saved is what `make test` wants to see.
"""
import os, re, subprocess, sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'

def find_notebooks(): return sorted(p for p in NBS.rglob('*.ipynb') if not any(o[0] in '._' for o in p.relative_to(NBS).parts))

def runnable_flags()->set[str]:
    "Flags of cells that this machine can run: those that need the real data beside the project, where it is"
    return {'real'} if (ROOT.parent/'shared'/'data').is_dir() else set()

def skipped(cell, flags):
    "Is `cell` one that nbdev_test would skip too?"
    lines = [o.strip() for o in cell.source.splitlines() if o.strip().startswith('#|')]
    words = {w for o in lines for w in o[2:].replace(':', ' ').split()}
    return 'nbdev_export(' in cell.source or bool(words & flags) or any(re.match(r'#\|\s*eval:\s*false', o) for o in lines)

def execute(path:Path, flags:set):
    "Run `path` in its own folder and write it back with its outputs"
    nb = nbformat.read(path, 4)
    client = NotebookClient(nb, timeout=1800, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}})
    with client.setup_kernel():
        for i,cell in enumerate(nb.cells):
            if cell.cell_type!='code' or skipped(cell, flags): continue
            cell.outputs = []
            client.execute_cell(cell, i)
            for o in cell.outputs: # Pillow shows a picture as both; the site needs one, the smaller
                if 'image/jpeg' in o.get('data', {}): o.data.pop('image/png', None)
    nbformat.write(nb, path)

def main(args):
    from nbdev.config import get_config
    os.chdir(ROOT)
    slow, args = '--slow' in args, [a for a in args if a!='--slow']
    bin_, paths = Path(sys.executable).parent, [Path(a).resolve() for a in args] or find_notebooks()
    subprocess.run([bin_/'nbdev_export'], check=True)
    flags, export_env = set(get_config().tst_flags.split())-runnable_flags()-({'slow'} if slow else set()), dict(os.environ) # with IN_TEST set, nbdev_export does nothing
    os.environ.update(IN_TEST='1', PYTHONWARNINGS='ignore::UserWarning', PYTHONPATH=str(ROOT), PYTHONHASHSEED='0', IMAGESIM_PROGRESS='false', OMP_WAIT_POLICY='PASSIVE',
                      PYDEVD_DISABLE_FILE_VALIDATION='1')
    for p in paths:
        try: execute(p, flags)
        except CellExecutionError as e: sys.exit(f'{p.relative_to(ROOT)} failed:\n{e}')
        print(f'ran {p.relative_to(ROOT)}')
    for cmd in ('nbdev_clean', 'nbdev_export'): subprocess.run([bin_/cmd], check=True, env=export_env)

if __name__=='__main__': main(sys.argv[1:])
