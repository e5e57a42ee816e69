"""Commands that read a trained model: classify by it, fit heads on its features. Heavy imports happen in `run`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pagoda.cli.settings import Settings, parse_settings


@dataclass(frozen=True, kw_only=True)
class Classify:
    """Classify images by the diffusion model of a run: the class under which it denoises an image best. Nothing is trained.

    Examples:
      pagoda classify runs/shapes photos/
      pagoda classify runs/shapes photos/ --risk 0 --calibrate labelled/ --out classes.json
      pagoda classify runs/captioned photos/ --prompt "a drawing of a {}" --class-names cat dog

    With --out, the same command continues where it was stopped.
    """

    run_dir: tyro.conf.Positional[str]
    """Run folder, teacher folder, or diffusers pipeline folder of a class-conditional model."""
    data: tyro.conf.Positional[str]
    """Images: folder, zip, IDX folder, parquet file, hub name, or `shapes`; opened as the run's own images were."""
    levels: int = 64
    """Noise levels of the full evaluation of an image."""
    risk: float = 0.01
    """Chance, per image, of another answer than the full evaluation's because a class was dropped early; 0 drops none."""
    weighting: Literal["eps", "elbo", "edm", "x0"] = "eps"
    """Which error is compared."""
    prompt: tuple[str, ...] = ("{}",)
    """For a model of texts: the text of a class, {} standing for its name; of several, the one that fits best counts."""
    class_names: tuple[str, ...] = ()
    """For a model of texts: the classes; the subfolders of the images when not given."""
    calibrate: str | None = None
    """Labelled images, others than those, to fit one temperature on: makes probabilities out of scores."""
    seed: int = 0
    """Decides the noise of each image."""
    out: Path | None = None
    """JSON file with every image's class, probability and network calls."""
    batch_size: int = 256
    """Rows a network call."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; a GPU when there is one."""
    set: Settings = ()
    """Other settings of the source, e.g. `--set source.pad=32 source.split=test`."""
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print no line per image."""

    def run(self) -> None:
        """Classify, print, write."""
        from pagoda.stages.classify import ClassifyConfig, classify_images
        from pagoda.stages.reading import open_readable

        config = ClassifyConfig(
            levels=self.levels, risk=self.risk, weighting=self.weighting, batch_size=self.batch_size, seed=self.seed,
            prompts=self.prompt, class_names=self.class_names,
        )  # fmt: skip
        model = open_readable(self.run_dir, device=self.device)
        settings = parse_settings(self.set)
        data = model.images(self.data, settings)
        labelled = None if self.calibrate is None else model.images(self.calibrate, settings)
        found = classify_images(model, data, config, calibrate_on=labelled, out=self.out)
        if not self.quiet:
            for name, k, row in zip(found.names, found.classes.tolist(), found.probabilities, strict=True):
                score = f"  {100 * float(row[k]):.1f} %" if found.calibrated else ""
                print(f"{name}  {found.class_names[k]}{score}")
        known = "" if found.accuracy is None else f", {100 * found.accuracy:.2f} % right"
        print(f"{len(found.names)} images, {float(found.calls.double().mean()):.1f} network calls each{known}")
        if self.out is not None:
            print(self.out)


@dataclass(frozen=True, kw_only=True)
class ProbeFit:
    """Fit a head to the features of a run's diffusion model: search part and noise level, then fit there.

    Examples:
      pagoda probe fit runs/shapes --data photos/
      pagoda probe fit runs/shapes --data photos/ --head attention --tap decoder.1 --sigma 0.1 --out probes/photos
    """

    run_dir: tyro.conf.Positional[str]
    """Run folder, teacher folder, or diffusers pipeline folder."""
    data: str
    """Labelled images: folder, zip, IDX folder, parquet file, hub name, or `shapes`; opened as the run's own images were."""
    head: Literal["linear", "attention", "knn"] = "linear"
    """What is fitted."""
    tap: str | None = None
    """Part of the network, e.g. `decoder.1`; searched when not given."""
    sigma: float | None = None
    """Noise level; searched when not given."""
    log_snr: float | None = None
    """The noise level as ln(1 / sigma^2), in place of `--sigma`."""
    grid: int = 1
    """Windows a side that a map is averaged over, for linear and knn."""
    search_count: int = 2000
    """Images that the search uses."""
    held_out: float = 0.1
    """Share of the images kept aside to tell the accuracy."""
    seed: int = 0
    """Decides what is held out, and the noise of each image."""
    out: Path | None = None
    """Folder for head, facts and heat map; `RUN/probe` when not given."""
    cache: Path | None = None
    """Folder for the features, to fit again without reading the images again."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; a GPU when there is one."""
    set: Settings = ()
    """Other settings of the source, e.g. `--set source.pad=32 source.label_column=group`."""

    def run(self) -> None:
        """Search, fit, write."""
        from pagoda.errors import ConfigError
        from pagoda.stages.probe import ProbeConfig, fit_probe
        from pagoda.stages.reading import open_readable
        from pagoda.understanding import HeadConfig, log_snr_of_sigma, sigma_of_log_snr

        if self.sigma is not None and self.log_snr is not None:
            raise ConfigError("--sigma and --log-snr say the same thing; give one of them.")
        sigma = self.sigma if self.log_snr is None else sigma_of_log_snr(self.log_snr)
        config = ProbeConfig(
            head=HeadConfig(kind=self.head, seed=self.seed), tap=self.tap, sigma=sigma, grid=self.grid,
            search_count=self.search_count, held_out=self.held_out, seed=self.seed,
        )  # fmt: skip
        model = open_readable(self.run_dir, device=self.device)
        data = model.images(self.data, parse_settings(self.set))
        fitted = fit_probe(model, data, config, cache=self.cache)
        folder = self.out or Path(self.run_dir) / "probe"
        fitted.save(folder)
        if fitted.search is not None:
            print(fitted.search.text())
        spec = fitted.head.spec
        told = "" if fitted.accuracy is None else f", {100 * fitted.accuracy:.2f} % right on images held out"
        where = f"{spec.tap} at sigma {spec.sigma:.3g} (log-SNR {log_snr_of_sigma(spec.sigma):.2f})"
        print(f"{self.head} head on {where}, {fitted.count} images{told}")
        print(folder)
        refresh_report(self.run_dir, self.out)


@dataclass(frozen=True, kw_only=True)
class ProbePredict:
    """Classify images by a head that `pagoda probe fit` fitted.

    Examples:
      pagoda probe predict runs/shapes photos/
      pagoda probe predict runs/shapes photos/ --probe probes/photos --out classes.json
    """

    run_dir: tyro.conf.Positional[str]
    """Folder of the model that the head was fitted to."""
    data: tyro.conf.Positional[str]
    """Images."""
    probe: Path | None = None
    """Folder of the head; `RUN/probe` when not given."""
    out: Path | None = None
    """JSON file with every image's class and probability."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; a GPU when there is one."""
    set: Settings = ()
    """Other settings of the source, e.g. `--set source.pad=32 source.split=test`."""
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print no line per image."""

    def run(self) -> None:
        """Predict, print, write."""
        import json

        from pagoda.files import write_text_atomic
        from pagoda.stages.classify import match_labels
        from pagoda.stages.probe import open_probe, predict_probe
        from pagoda.stages.reading import open_readable

        head, _ = open_probe(self.probe or Path(self.run_dir) / "probe")
        model = open_readable(self.run_dir, device=self.device)
        data = model.images(self.data, parse_settings(self.set))
        probabilities = predict_probe(model, head, data)
        classes = probabilities.argmax(1)
        rows = [
            {"image": name, "class": head.class_names[k], "probability": round(float(p[k]), 6)}
            for name, k, p in zip(data.sample_ids, classes.tolist(), probabilities, strict=True)
        ]
        for row in () if self.quiet else rows:
            print(f"{row['image']}  {row['class']}  {100 * float(str(row['probability'])):.1f} %")
        truth = match_labels(head.class_names, data)
        accuracy = None if truth is None else float((classes == truth).double().mean())
        print(f"{len(rows)} images{'' if accuracy is None else f', {100 * accuracy:.2f} % right'}")
        if self.out is not None:
            write_text_atomic(self.out, json.dumps({"accuracy": accuracy, "images": rows}, indent=1))
            print(self.out)


@dataclass(frozen=True, kw_only=True)
class ProbeRank:
    """How many directions the diffusion model keeps at each noise level: rank and trace of its Jacobian, and its dimension.

    Examples:
      pagoda probe rank runs/shapes --data photos/
      pagoda probe rank runs/shapes --data photos/ --n 8 --max-rank 256
    """

    run_dir: tyro.conf.Positional[str]
    """Run folder, teacher folder, or diffusers pipeline folder."""
    data: str
    """Images at which the Jacobian is taken: folder, zip, IDX folder, parquet file, hub name, or `shapes`."""
    n: int = 4
    """How many images."""
    max_rank: int = 128
    """Where the search for the rank ends; larger ones are told as `>=`."""
    out: Path | None = None
    """Folder for `rank.json` and `rank.png`; `RUN/probe` when not given."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; a GPU when there is one."""
    set: Settings = ()
    """Other settings of the source, e.g. `--set source.pad=32 source.split=test`."""

    def run(self) -> None:
        """Profile, print, write."""
        from pagoda.stages.rank import profile_model, profile_text, save_profile
        from pagoda.stages.reading import open_readable

        model = open_readable(self.run_dir, device=self.device)
        data = model.images(self.data, parse_settings(self.set))
        profile = profile_model(model, data, count=self.n, max_rank=self.max_rank)
        folder = self.out or Path(self.run_dir) / "probe"
        save_profile(profile, folder)
        print(profile_text(profile))
        print(f"intrinsic dimension about {profile.intrinsic_dimension:.0f} of {profile.size}")
        print(folder)
        refresh_report(self.run_dir, self.out)


def refresh_report(run_dir: str, out: Path | None) -> None:
    """Show in a run's report what was written into its folder; other folders have no report."""
    from pagoda.stages.report import write_report
    from pagoda.stages.run_folder import RunFolder

    if out is None and (Path(run_dir) / "config.yaml").is_file():
        write_report(RunFolder.open(run_dir))
