"""What a `GEKOTrainer` writes about each sample."""

from __future__ import annotations

import os
from pathlib import Path

from geko_kernels.training.planned import PlannedMixin
from geko_kernels.training.report.samples import MOST_SAMPLES, SAMPLES_NAME, sample_rows, write_rows


class SamplesMixin(PlannedMixin):
    """`write_samples`."""

    def write_samples(self, path: str | os.PathLike[str]) -> None:
        """Write the statistics of each sample, one row a sample, as `.jsonl`, `.csv` or `.parquet`.

        A run of up to 200,000 samples writes `samples.jsonl` into `output_dir` at its end. The columns:

            id                  the row of the user's data
            record_id, text     the data's own `id`, and the first 200 characters of their `text`, `prompt`,
                                `instruction`, `messages` or `conversations`, where they have one; the dataset must
                                be a list of dicts, a `datasets.Dataset` or of `load_dataset`
            epochs, losses      lists, one entry a visit since `train` was called: its planned epoch, from 0, and the
                                mean loss of its tokens, nats, before weighting. Probes are visits of the epoch that
                                they precede; visits without a label or a finite loss are left out. Samples that
                                `auto_stop` holds back have one entry an epoch: the epoch's last evaluation
            label_probabilities exp(-loss) of each visit, the geometric mean of the label's probability over its tokens
            hits                for each visit, the share of its tokens predicted right
            bucket, times_seen  at the end of the run
            times_forgotten     how often the sample was found wrong after it had been right
            quarantined         whether the noise guard holds it back at the end
            suspected           whether it does, or would if there were more suspects; null if the guard did not judge
                                labels: it was off, the run had one epoch, or the model did not generalise
            label_error         in [0, 1], higher if a wrong label is more likely, see `label_error_scores`; null
                                without a visit
            duplicate_group     the `id` of the first sample with the same `input_ids`; null if no other has them, or
                                if the dataset is not a list, a `datasets.Dataset` or from `load_dataset`

        With several processes only the first writes.

        Raises:
            RuntimeError: called before `train`.
            ValueError: another ending. ImportError: pandas or pyarrow is missing for `.parquet`.
        """
        if self.sampler is None or self.efficiency.visits is None:
            raise RuntimeError("write_samples: nothing has been recorded yet; call it after train()")
        if not self.is_world_process_zero():
            return
        if self.efficiency.reduce is None:  # in the middle of an epoch it has the visits so far
            self.efficiency.flush_visits()
        rows = sample_rows(self.sampler.state, self.sampler, self.efficiency.visits.visits(), self.train_dataset)
        write_rows(path, rows)

    def _write_samples_at_end(self, folder: str | os.PathLike[str]) -> None:
        if len(self._planned().state) <= MOST_SAMPLES:
            self.write_samples(Path(folder) / SAMPLES_NAME)
