"""
The job scripts on a real SLURM: `python -m unittest tests/test_slurm.py`, some minutes. Brings up a cluster of its own
with two nodes on this machine, for which it needs root and Debian's packages (apt-get install slurm-wlm munge).
"""
import gzip
import hashlib
import http.server
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from rendered_digits import rendered_digits  # noqa: E402
from unittests import idx, what_a_run_left  # noqa: E402

MISSING = [name for name in ['slurmctld', 'slurmd', 'sbatch', 'munged'] if not shutil.which(name)]
# Two nodes, and two partitions: jobs in `high` preempt those in `low`, which are requeued after 5 s of grace.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation={state}/ctld
SlurmdSpoolDir={state}/spool-%n
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/slurmd-%n.pid
SlurmctldLogFile={state}/slurmctld.log
SlurmdLogFile={state}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
MpiDefault=none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
MinJobAge=3600
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 State=UNKNOWN
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=5
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def free_ports(count):
    sockets = [socket.create_server(('127.0.0.1', 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def command(*words, **options):
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True, timeout=60,
                          **options).stdout


@unittest.skipIf(MISSING, f'there is no {", ".join(MISSING)} (Debian: apt-get install slurm-wlm munge)')
@unittest.skipUnless(os.getuid() == 0, 'only root can bring up a SLURM cluster')
class TestSlurm(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = Path(folder.name)
        state = cls.folder / 'slurm'
        for name in ['ctld', 'spool-n1', 'spool-n2']:
            (state / name).mkdir(parents=True)
        configuration = state / 'slurm.conf'
        configuration.write_text(CONFIGURATION.format(host=socket.gethostname().split('.')[0], state=state,
                                                      ports=free_ports(3)))
        # MASTER_ADDR, since the nodes' names are known to this cluster alone
        cls.environment = {**os.environ, 'SLURM_CONF': str(configuration), 'MASTER_ADDR': '127.0.0.1',
                           'ACTIVATE': f'export PATH={Path(sys.executable).parent}:$PATH'}
        cls.environment.pop('OMP_NUM_THREADS', None)
        if subprocess.run(['pgrep', '-x', 'munged'], capture_output=True).returncode:
            os.makedirs('/run/munge', exist_ok=True)
            shutil.chown('/run/munge', 'munge', 'munge')
            command('runuser', '-u', 'munge', '--', 'munged')
            cls.addClassCleanup(subprocess.run, ['pkill', '-x', 'munged'])
        cls.addClassCleanup(cls.stop_daemons, state)
        for words in [['slurmctld'], ['slurmd', '-N', 'n1'], ['slurmd', '-N', 'n2']]:
            command(*words, env=cls.environment)
        cls.wait_for(lambda: cls.slurm('sinfo', '-h', '-N', '-o', '%t').split() == ['idle'] * 4, 60)

    @classmethod
    def stop_daemons(cls, state):
        cls.slurm('scancel', '--full', '--signal=KILL', '--user=root')
        for path in [state / 'slurmctld.pid', state / 'slurmd-n1.pid', state / 'slurmd-n2.pid']:
            if path.exists():
                pid = int(path.read_text())
                os.kill(pid, 15)
                cls.wait_for(lambda pid=pid: not os.path.exists(f'/proc/{pid}'), 30)

    @classmethod
    def slurm(cls, *words):
        return command(*words, env=cls.environment)

    @staticmethod
    def wait_for(condition, seconds):
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise AssertionError(f'waited {seconds} s in vain')
            time.sleep(0.5)

    def setUp(self):
        """A checkout of its own for the test, in which the jobs run."""
        self.checkout = Path(tempfile.mkdtemp(dir=self.folder))
        for path in [*REPOSITORY.glob('*.py'), REPOSITORY / 'slurm']:
            (self.checkout / path.name).symlink_to(path)

    def submit(self, *words, **variables):
        """Submits a job that trains on rendered digits, if the words end with flags, and returns its id."""
        words = ['sbatch', '--parsable', '--cpus-per-task=1', *words]
        return command(*words, cwd=self.checkout, env={**self.environment, **variables}).strip()

    def job(self, job_id):
        """What SLURM knows of a job, by name."""
        return dict(re.findall(r'(\w+)=(\S+)', self.slurm('scontrol', 'show', 'job', job_id)))

    def start_now(self, job_id):
        """Ends the two minutes that SLURM holds back a job that it has requeued."""
        job = self.job(job_id)
        if job['JobState'] == 'PENDING' and job['Reason'] == 'BeginTime':
            self.slurm('scontrol', 'update', f'JobId={job_id}', 'StartTime=now')

    def wait_for_end(self, *job_ids, seconds=1200):
        def all_over():
            for job_id in job_ids:
                self.start_now(job_id)
            states = {self.job(job_id)['JobState'] for job_id in job_ids}
            return not {'PENDING', 'RUNNING', 'COMPLETING', 'CONFIGURING', 'REQUEUED'} & states
        self.wait_for(all_over, seconds)

    def output(self, job_id):
        path = self.checkout / f'slurm-{job_id}.out'
        return path.read_text() if path.exists() else ''

    def run_folder(self, job_id):
        return self.checkout / 'VAE_logs' / f'job_{job_id}'

    def test_jobs_go_on_after_a_preemption_and_the_time_limit(self):
        flags = ['slurm/train.sbatch', '--dataset', 'rendered', '--hidden_dims', '32', '--z_dim', '2', '--epochs']
        trial = self.submit(*flags, '3')
        self.wait_for_end(trial)
        seconds = float(re.findall(r'epoch .* ([\d.]+) s$', self.output(trial), re.MULTILINE)[-1])
        flags.append(str(math.ceil(75 / seconds)))  # of the limit's minute, 40 s are left to a life of the job
        limited = self.submit('--nodelist=n1', '--time=1', *flags)
        # By itself: beside others, on a slow machine, each of its minutes may be over before its first epoch is.
        self.wait_for_end(limited)
        undisturbed = self.submit('--nodelist=n1', *flags)
        preempted = self.submit('--nodelist=n2', *flags)
        self.wait_for(lambda: 'epoch   2/' in self.output(preempted), 300)
        (self.checkout / 'short.sh').write_text('#!/bin/sh\nsleep 1\n')
        urgent = self.submit('--nodelist=n2', '--exclusive', '--partition=high', 'short.sh')
        self.wait_for_end(undisturbed, preempted, urgent)
        expected = what_a_run_left(self.run_folder(undisturbed))
        for job_id in [undisturbed, limited, preempted]:
            self.assertEqual(self.job(job_id)['JobState'], 'COMPLETED', self.output(job_id))
            self.assertEqual(int(self.job(job_id)['Restarts']) > 0, job_id != undisturbed)
            self.assertEqual('continued after epoch' in self.output(job_id), job_id != undisturbed)
            left = what_a_run_left(self.run_folder(job_id))
            for name in expected:
                if name in ['best', 'last']:
                    torch.testing.assert_close(left[name], expected[name], rtol=0, atol=0)
                elif name != 'files':  # an undisturbed run opens fewer event files
                    self.assertEqual(left[name], expected[name], name)
        self.assertIn('Time is almost up', self.output(limited))

    def stand_in(self, script):
        """A shell script in the place of Python; returns what activates it."""
        program = self.checkout / 'bin' / 'python'
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\n{script}\n')
        program.chmod(0o755)
        return f'PATH={program.parent}:$PATH'

    def test_flags_and_threads(self):
        (self.checkout / 'settings.txt').write_text('# a comment\n--lr 1e-3 --hidden_dims 64 32\n\n--lr 1e-4\n')
        activate = self.stand_in('echo "$OMP_NUM_THREADS: $*"')
        sweep = self.submit('--array=0-1', 'slurm/sweep.sbatch', '--epochs', '3', SETTINGS='settings.txt',
                            ACTIVATE=activate)
        ddp = self.submit('--nodes=2', '--ntasks-per-node=2', 'slurm/train_ddp.sbatch', '--lr', '0.1',
                          ACTIVATE=activate)
        train = self.submit('--cpus-per-task=2', 'slurm/train.sbatch', '--z_dim', '2 3', ACTIVATE=activate)
        self.wait_for_end(f'{sweep}_0', f'{sweep}_1', ddp, train)
        beginning = 'train_pl.py --dataset mnist'
        self.assertEqual([self.output(job_id) for job_id in [f'{sweep}_0', f'{sweep}_1', ddp, train]], [
            f'1: {beginning} --lr 1e-3 --hidden_dims 64 32 --epochs 3\n', f'1: {beginning} --lr 1e-4 --epochs 3\n',
            4 * f'1: {beginning} --num_nodes 2 --devices 2 --lr 0.1\n', f'2: {beginning} --z_dim 2 3\n'])

    def test_preempted_before_it_is_ready(self):
        """A program that SIGTERM ends at once, as it does train_pl.py while Python still starts."""
        activate = self.stand_in('echo life $SLURM_RESTART_COUNT\n[ -n "$SLURM_RESTART_COUNT" ] || sleep 100')
        job_id = self.submit('--nodelist=n1', 'slurm/train.sbatch', ACTIVATE=activate)
        self.wait_for(lambda: 'life' in self.output(job_id), 60)
        (self.checkout / 'short.sh').write_text('#!/bin/sh\n')
        urgent = self.submit('--nodelist=n1', '--exclusive', '--partition=high', 'short.sh')
        self.wait_for_end(job_id, urgent)
        self.assertEqual((self.job(job_id)['JobState'], self.job(job_id)['Restarts']), ('COMPLETED', '1'))
        self.assertIn('life 1', self.output(job_id))

    def test_two_nodes_reach_the_bpd_of_one_process(self):
        flags = ['--dataset', 'rendered', '--epochs', '3']
        job_id = self.submit('slurm/train_ddp.sbatch', *flags)
        self.wait_for_end(job_id)
        self.assertEqual(self.job(job_id)['JobState'], 'COMPLETED', self.output(job_id))
        self.assertIn('on cpu x 2', self.output(job_id))
        alone = self.submit('slurm/train.sbatch', *flags)
        self.wait_for_end(alone)
        bpd, expected = (json.loads((self.run_folder(name) / 'results.json').read_text())['test_bpd']
                         for name in [job_id, alone])
        self.assertAlmostEqual(bpd, expected, delta=0.001)

    def test_a_bad_flag(self):
        job_id = self.submit('slurm/train.sbatch', '--z_dim', '0')
        self.wait_for_end(job_id)
        self.assertEqual((self.job(job_id)['JobState'], self.job(job_id)['ExitCode']), ('FAILED', '2:0'))
        self.assertIn('error: --z_dim must be at least 1', self.output(job_id))

    def test_no_data(self):
        job_id = self.submit('slurm/train.sbatch', '--data_dir', 'data', http_proxy='http://127.0.0.1:9',
                             https_proxy='http://127.0.0.1:9')
        self.wait_for_end(job_id)
        self.assertEqual(self.job(job_id)['JobState'], 'FAILED')
        self.assertIn('error: MNIST is not complete in data/MNIST/raw', self.output(job_id))
        self.assertFalse((self.checkout / 'VAE_logs').exists())

    def test_scripts_say_what_is_missing(self):
        nowhere = self.submit('--chdir=/', f'--output={self.checkout}/slurm-%j.out', 'slurm/train.sbatch')
        no_python = self.submit('slurm/train.sbatch', ACTIVATE='PATH=/nowhere')
        too_many = self.submit('--array=9', 'slurm/sweep.sbatch')
        self.wait_for_end(nowhere, no_python, too_many)
        for job_id, problem in [(nowhere, 'slurm/job.sh'), (no_python, 'set ACTIVATE'), (f'{too_many}_9', '=0-7')]:
            self.assertEqual(self.job(job_id)['JobState'], 'FAILED')
            self.assertIn(problem, self.output(job_id))

    def test_eight_array_tasks_on_an_empty_data_folder(self):
        """The default sweep, with a local server as MNIST's mirror that has a small stand-in for it."""
        images, labels = rendered_digits(700)
        content = dict(zip(['train-images-idx3-ubyte', 'train-labels-idx1-ubyte', 't10k-images-idx3-ubyte',
                            't10k-labels-idx1-ubyte'],
                           map(idx, [images[:600], labels[:600], images[600:], labels[600:]])))
        mirror = self.checkout / 'mirror'
        mirror.mkdir()
        for name, data in content.items():
            (mirror / f'{name}.gz').write_bytes(gzip.compress(data))
        requests = []

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args):
                super().__init__(*args, directory=mirror)

            def log_request(self, *args):
                requests.append(self.path)

        server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        md5 = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in mirror.iterdir()}
        files = {name: (hashlib.md5(data).hexdigest(), len(data)) for name, data in content.items()}
        (self.checkout / 'sitecustomize.py').write_text(
            f'import sys\nsys.path.insert(0, {str(self.checkout)!r})\nimport bmnist\n'
            f'bmnist.MNIST.mirrors = ["http://127.0.0.1:{server.server_port}/"]\n'
            f'bmnist.MNIST.resources = {list(md5.items())}\n'
            f'bmnist.FILES, bmnist.TRAIN_SIZES, bmnist.NUM_VAL = {files}, [500], 100\n')
        job_id = self.submit('slurm/sweep.sbatch', '--data_dir', 'data', '--epochs', '2', '--hidden_dims', '16',
                             PYTHONPATH=str(self.checkout))
        tasks = [f'{job_id}_{task}' for task in range(8)]
        self.wait_for_end(*tasks)
        self.assertEqual({self.job(task)['JobState'] for task in tasks}, {'COMPLETED'}, self.output(tasks[0]))
        self.assertEqual({path.name for path in (self.checkout / 'VAE_logs').iterdir()}, {f'job_{t}' for t in tasks})
        settings = [json.loads((self.run_folder(task) / 'results.json').read_text())['hyperparameters']
                    for task in tasks]
        self.assertEqual([(flags['z_dim'], flags['seed']) for flags in settings],
                         [(z_dim, seed) for z_dim in [2, 20] for seed in [1, 2, 3, 4]])
        self.assertEqual(sum('Downloading' in self.output(task) for task in tasks), 1)
        self.assertEqual({name: requests.count(f'/{name}') for name in md5}, dict.fromkeys(md5, requests.count(
            f'/{next(iter(md5))}')))
        self.assertLess(len(requests), 9)  # one task asked; torchvision looks for redirections first


if __name__ == '__main__':
    unittest.main()
