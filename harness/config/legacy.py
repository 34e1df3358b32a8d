"""Old names of the experiment's attributes, until every package uses the new ones."""

from __future__ import annotations


class Legacy:
    root = property(lambda self: self.paths.root)
    scale_rows = property(lambda self: self.reference_rows)
    seconds_budget = property(lambda self: self.exclusive)

    def job_batch(self, stage, name):
        if stage == "train":
            return self.students[name].settings.batch
        return getattr(self.teachers[name], "batch", 1) if stage == "teacher" else None

    def teacher_of(self, student):
        return self.students[student].teacher

    def method_config(self, student):
        return self.students[student].settings

    def requirements(self, student):
        return self.students[student].requirements

    def student(self, name):
        return self.students[name]

    @property
    def statistics_extractor(self):
        if self.evaluation.statistics is None:
            return None
        from harness.features.base import provides

        names = [n for n in self.evaluation.extractors if "inception" in provides(self.features[n])]
        edm = [name for name in names if "fid-edm" in provides(self.features[name])]
        return (edm or names)[0]

    def fetch_pretrained(self):
        from harness.features.lpips import trunk_file
        from harness.features.timm_backbones import weights_file

        needs = [student.requirements for student in self.students.values()]
        for name in sorted({name for need in needs for name in need.backbones}):
            weights_file(name)
        if any(need.lpips for need in needs):
            trunk_file()

    def pairs_name(self, student):
        pairs = self.students[student].pairs
        return pairs.name if pairs else None

    def pair_sampler(self, name):
        return self.pair_sets[name].sampler

    def data_spec(self):
        return self.data_fingerprint

    def prepare_spec(self):
        return self.preparation_fingerprint

    def features_spec(self, name):
        return self.features_fingerprint(name)

    def teacher_spec(self, name):
        return self.teacher_fingerprint(name)

    def pairs_spec(self, name):
        return self.pairs_fingerprint(name)

    def run_spec(self, student, seed):
        return self.run_fingerprint(student, seed)

    def budget(self, student):
        return list(self.students[student].budget)

    def budget_spec(self, student):
        return [limit.model_dump() for limit in self.budget(student)]

    def score_spec(self):
        from harness.evaluation.protocol import fingerprint

        return fingerprint(self.scoring())

    def reference_score_spec(self, teacher):
        from harness.evaluation.protocol import reference_fingerprint

        return reference_fingerprint(self.reference_scoring(teacher))

    def report_spec(self):
        return self.report_fingerprint()

    def data_dir(self):
        return self.paths.data

    def features_dir(self, name):
        return self.paths.features(name)

    def teacher_dir(self, name):
        return self.paths.teacher(name)

    def pairs_dir(self, name):
        return self.paths.pairs(name)

    def run_dir(self, student, seed):
        return self.paths.run(student, seed)

    def score_path(self, student, seed):
        return self.paths.scores(student, seed)

    def reference_score_path(self, teacher):
        return self.paths.reference_scores(teacher)
