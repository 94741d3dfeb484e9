"""The numbers of a whole evaluation, from all its parts, and its list of samples.

Legend: N samples (the first of each prompt), M measured rows, D features of an embedding.
"""

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluate.checks import held_out_check, parse_flags, pixel_check
from pipeline.evaluate.metrics import FeatureSums, cosine, frechet_distance, mean_of, r_precision, rate_of
from pipeline.evaluate.parts import ENLARGED, read_part
from pipeline.evaluate.prompts import Watch, first_images, unwatched
from pipeline.evaluate.sets import NUM_NEIGHBOURS, cmmd, precision_recall
from pipeline.evaluate.work import Work
from pipeline.retrieve import Neighbour, NeighbourIndex
from pipeline.workspace.store import Artifact

Json = dict[str, Any]
Rows = list[Json]
Vectors = NDArray[np.float64]

_KINDS = ("samples", "trained", "validation")
_NUM_REQUESTED = 24
"""Neighbours requested from the index; enough of them are training rows."""
_CLOSE_QUANTILE = 0.95


class Aggregate:
    """The committed parts of one evaluation.

    Args:
        output: The evaluate step's artifact.
        work: What was sampled and measured; all its parts are committed.
    """

    def __init__(self, output: Artifact, work: Work) -> None:
        self.prompts = work.prompts
        self._trained = work.trained
        self._rows_split = work.rows_split
        tables = {kind: [read_part(output, part) for part in work.parts if part.kind == kind] for kind in _KINDS}
        self._parts = [[row for row in rows if row["image_number"] == 0] for rows in tables["samples"]]
        self.samples = sorted(
            (row for rows in tables["samples"] for row in rows), key=lambda r: (r["prompt_number"], r["image_number"])
        )
        self.firsts = [row for row in self.samples if row["image_number"] == 0]
        self.rows = [row for rows in tables["validation"] for row in rows]
        self._trained_rows = [row for rows in tables["trained"] for row in rows]

    def measure(self, embed: Artifact, neighbours: "TrainingNeighbours", watch: Watch = unwatched) -> Json:
        """All numbers of metrics.json, without those that cannot be measured on this source of prompts.

        Args:
            embed: The rows that were trained on, to compare with.
            neighbours: The training rows near a picture.
            watch: Is told how far the choice of these rows is.
        """
        metrics: Json = {"num_prompts": len(self.firsts), "prompts": self.prompts.source}
        metrics["num_prompts_in_file"] = self.prompts.num_in_file
        metrics["rows"] = {"validation": "validation", "train": "training"}[self._rows_split]
        metrics["pixel_check"] = pixel_check(self.firsts, self.prompts)
        metrics["held_out"] = held_out_check(self.firsts, self.prompts, self._trained_rows, self._trained)
        metrics["clip_score"] = self._clip_scores()
        metrics["r_precision"] = self._r_precision()
        metrics["preference"] = self._preference()
        metrics |= self._distances(embed, watch)
        metrics["frechet_features"] = self._frechet_features()
        metrics["prior"] = self._prior("z_prior")
        metrics["prior_2"] = self._prior("z_prior_2")
        metrics["decoder"] = self._decoder()
        metrics |= self._upsamplers()
        metrics["bits_per_dim"] = self._bounds()
        metrics["memorisation"] = self._memorisation(neighbours)
        return {name: value for name, value in metrics.items() if value}

    def list_samples(self, neighbours: "TrainingNeighbours") -> Rows:
        """One row for each sample: file, prompt, seed, settings, pixel check and nearest training picture."""
        nearest = neighbours.nearest(matrix(self.samples, "z_image"))
        return [
            {
                "file": row["file"],
                "prompt": row["prompt"],
                "kind": row["kind"],
                "seed": row["seed"],
                "settings": json.loads(row["settings"]),
                "check": parse_flags(row["check"]),
                "nearest": near,
            }
            for row, near in zip(self.samples, nearest, strict=True)
        ]

    def _clip_scores(self) -> Json:
        z_image, z_text = matrix(self.firsts, "z_image"), matrix(self.firsts, "z_text")
        scores = {"generated": mean_of(cosine(z_image, z_text))}
        partners = [self.prompts.partners[row["prompt_number"]] for row in self.firsts]
        pairs = [(n, other) for n, other in enumerate(partners) if other is not None]
        if pairs:
            scores["shuffled"] = mean_of(cosine(z_image[[n for n, _ in pairs]], z_text[[o for _, o in pairs]]))
        if self._has_real():
            scores["real"] = mean_of(cosine(matrix(self.firsts, "z_real"), z_text))
        return scores

    def _r_precision(self) -> Json:
        texts = list(dict.fromkeys(row["prompt"] for row in self.firsts))
        if len(texts) < 2:
            return {}
        first = {row["prompt"]: row["z_text"] for row in reversed(self.firsts)}
        z_text = np.array([first[text] for text in texts])
        numbers = {text: number for number, text in enumerate(texts)}
        own = [numbers[row["prompt"]] for row in self.firsts]
        rates: Json = {
            "generated": r_precision(matrix(self.firsts, "z_image"), z_text, own).to_dict(),
            "chance": 1 / len(texts),
        }
        if self._has_real():
            rates["real"] = r_precision(matrix(self.firsts, "z_real"), z_text, own).to_dict()
        return rates

    def _preference(self) -> Json:
        """Share of pictures that CLIP finds nearer to their caption than to the caption's hard negative.

        The real pictures are those of the prompts, else the measured rows; 1/2 is chance.
        """
        real = [row["margin_real"] for row in self.firsts] if self._has_real() else [row["margin"] for row in self.rows]
        margins = {"generated": [row["margin"] for row in self.firsts], "real": real}
        rates: Json = {}
        for name, values in margins.items():
            comparable = [value for value in values if value is not None]
            if comparable:
                without = len(values) - len(comparable)
                rates[name] = rate_of(value > 0 for value in comparable).to_dict() | {"without_negative": without}
        return rates | {"chance": 0.5} if rates else {}

    def _distances(self, embed: Artifact, watch: Watch) -> Json:
        """Samples against real pictures of the same prompts; ``real`` compares two equal sets of training pictures."""
        count = len(self.firsts)
        if not self._has_real() or count < 2:
            return {}
        generated, real = matrix(self.firsts, "z_image"), matrix(self.firsts, "z_real")
        frechet: Json = {"generated": frechet_distance(self._sums("z_image"), self._sums("z_real")), "count": count}
        mmd: Json = {"generated": cmmd(generated, real), "count": count}
        manifolds = {"generated": (generated, real)}
        train = first_images(embed, 2 * count, "train", watch)
        if len(train) == 2 * count:
            z_image = train.astype(np.float64)
            halves = (z_image[::2], z_image[1::2])
            frechet["real"] = frechet_distance(*(FeatureSums.of(half) for half in halves))
            mmd["real"] = cmmd(*halves)
            manifolds["real"] = halves
        measured: Json = {"frechet_clip": frechet, "cmmd": mmd}
        if count > NUM_NEIGHBOURS:
            rates = {name: precision_recall(*sets) for name, sets in manifolds.items()}
            for place, name in enumerate(("precision", "recall")):
                measured[name] = {kind: rate[place].to_dict() for kind, rate in rates.items()}
        return measured

    def _frechet_features(self) -> Json:
        """Frechet distance on the features of ``evaluate.features_path``; empty without it."""
        if len(self.firsts) < 2 or any(row["features_real"] is None for row in self.firsts):
            return {}
        distance = frechet_distance(self._sums("features"), self._sums("features_real"))
        return {"generated": distance, "count": len(self.firsts)}

    def _sums(self, column: str) -> FeatureSums:
        sums = [FeatureSums.of(matrix(rows, column)) for rows in self._parts if rows]
        return sum(sums[1:], start=sums[0])

    def _prior(self, column: str) -> Json:
        """Cosines of a prior's samples for the captions of the rows."""
        if not self.rows or column not in self.rows[0]:
            return {}
        z_prior, z_image, z_text = (matrix(self.rows, name) for name in (column, "z_image", "z_text"))
        measured: Json = {
            "z_image": mean_of(cosine(z_prior, z_image)),
            "z_text": mean_of(cosine(z_prior, z_text)),
            "true_z_text": mean_of(cosine(z_image, z_text)),
        }
        if len(self.rows) > 1:
            measured["unrelated_image"] = mean_of(cosine(z_prior, np.roll(z_image, 1, axis=0)))
            measured["unrelated_text"] = mean_of(cosine(z_prior, np.roll(z_text, 1, axis=0)))
        return measured

    def _decoder(self) -> Json:
        rows = [row for row in self.rows if row["z_reconstruction"] is not None]
        if not rows:
            return {}
        reconstructed, real = matrix(rows, "z_reconstruction"), matrix(rows, "z_image")
        measured: Json = {"reconstruction": mean_of(cosine(reconstructed, real))}
        if len(rows) > 1:
            measured["unrelated"] = mean_of(cosine(reconstructed, np.roll(real, 1, axis=0)))
        return measured

    def _upsamplers(self) -> Json:
        rows = [row for row in self.rows if row["psnr_db"] is not None]
        return {
            stage: {
                name: mean_of([row[name][stage] for row in rows])
                for name in ("real_sharpness", *ENLARGED, *(f"bicubic_{name}" for name in ENLARGED))
            }
            for stage in (rows[0]["psnr_db"] if rows else ())
        }

    def _bounds(self) -> Json:
        """Bits per dimension of each network that samples pixels and was trained with the variational bound."""
        rows = [row["bits_per_dim"] for row in self.rows if row["bits_per_dim"] is not None]
        return {stage: mean_of([row[stage] for row in rows]) for stage in (rows[0] if rows else ())}

    def _memorisation(self, neighbours: "TrainingNeighbours") -> Json:
        """Similarity of samples, and of real unseen pictures, to their nearest training pictures.

        Without validation rows only drawn pictures are unseen: a training picture's nearest one is itself.
        """
        is_unseen = self._rows_split == "validation" or self.prompts.source == "drawn"
        real = matrix(self.firsts, "z_real") if self._has_real() else matrix(self.rows, "z_image")
        nearest = neighbours.similarity(matrix(self.firsts, "z_image"))
        if not nearest.size or not real.size:
            return {}
        if not is_unseen:
            return {"generated": mean_of(nearest)}
        nearest_real = neighbours.similarity(real)
        bound = float(np.quantile(nearest_real, _CLOSE_QUANTILE))
        return {
            "generated": mean_of(nearest),
            "real": mean_of(nearest_real),
            "closer_than_real": rate_of(bool(value > bound) for value in nearest).to_dict(),
        }

    def _has_real(self) -> bool:
        return all(row["z_real"] is not None for row in self.firsts)


class TrainingNeighbours:
    """Nearest training rows of embeddings, the most similar first.

    Args:
        index: The index step.
    """

    def __init__(self, index: Artifact) -> None:
        self._index = NeighbourIndex.open(index)

    def find(self, vectors: Vectors) -> list[list[Neighbour]]:
        """For each of (Q, D) vectors, the training rows among its nearest rows."""
        if not vectors.size:
            return []
        neighbours = self._index.find(vectors.astype(np.float32), _NUM_REQUESTED, modality="image")
        return [self._training_only(row) for row in neighbours]

    def nearest(self, vectors: Vectors) -> list[Json | None]:
        """Uid and cosine of each vector's nearest training row; None if none of its nearest rows is a training row."""
        nearest = [row[0] if row else None for row in self.find(vectors)]
        return [near and {"uid": near.uid, "similarity": round(near.similarity, 4)} for near in nearest]

    def similarity(self, vectors: Vectors) -> Vectors:
        """Cosine to the nearest training row, of those vectors that have one."""
        return np.array([row[0].similarity for row in self.find(vectors) if row])

    def _training_only(self, row: list[Neighbour]) -> list[Neighbour]:
        splits = self._index.rows([near.id for near in row]).column("split").to_pylist()
        return [near for near, split in zip(row, splits, strict=True) if split == "train"]


def matrix(rows: Rows, column: str) -> Vectors:
    """A column of vectors as (N, D)."""
    return np.array([row[column] for row in rows], np.float64)
