"""R-Precision of finished runs, and its judges: every kind of CLIP, and what is refused."""

import sys
import types

import pytest
import torch
from transformers import BertConfig
from typer.testing import CliRunner

from dreamfusion_fast import cli, evaluate_runs, export, judges, metrics, train
from dreamfusion_fast.config import preset
from dreamfusion_fast.toybox import shapes
from dreamfusion_fast.toybox.train_prior import build_tokenizer
from dreamfusion_fast.toybox.train_scorer import ScorerConfig, build_model
from dreamfusion_fast.toybox.train_scorer import export as export_clip


@pytest.fixture
def grey(monkeypatch):
    """Grey pictures in place of rendered ones."""

    def render_views(renderer, cameras, size=None, background=None, mode="albedo"):
        assert mode in ("albedo", "textureless")
        return torch.full((len(cameras.focal), 3, size, size), 0.5)

    monkeypatch.setattr(export, "render_views", render_views)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of one step."""
    folder = tmp_path_factory.mktemp("runs") / "car"
    config = preset("exemplar", prompt="a red car", steps=1)
    list(train.Trainer(config, folder).run())
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP in transformers' format, untrained."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = build_model(len(tokenizer))
    export_clip([p.detach() for p in model.parameters()], tokenizer, folder, ScorerConfig())
    return folder


def test_prompts_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red car\n\n  a blue ball \na red car\n")
    assert evaluate_runs.read_prompts(path) == ["a red car", "a blue ball"]
    path.write_text("\n \n")
    with pytest.raises(ValueError, match=r"`--prompts`: expected a prompt a line, got .*, empty"):
        evaluate_runs.read_prompts(path)
    with pytest.raises(ValueError, match=r"`--prompts`: expected a text file, got .*none"):
        evaluate_runs.read_prompts(tmp_path / "absent.txt")


def test_runs_that_cannot_be_judged(finished, tmp_path):
    with pytest.raises(ValueError, match=r"expected the prompt of .* the file's 1, got none that"):
        evaluate_runs.score([finished], ["a blue ball"])
    with pytest.raises(ValueError, match=r"`RUN`: expected a run's folder, got .*holds none"):
        evaluate_runs.score([tmp_path / "absent"], ["a red car"])
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(ValueError, match=r"whose config\.json holds no settings"):
        evaluate_runs.score([tmp_path], ["a red car"])


def test_runs_are_judged_by_every_clip(finished, clip, grey, monkeypatch):
    asked = []

    def r_precision(judge, images, prompts, index):
        asked.append((len(prompts), prompts[index]))
        return judge.similarities(images, prompts).argmax(1).eq(index).float().mean().item()

    monkeypatch.setattr(metrics, "r_precision", r_precision)
    prompts = ["a blue ball", "a red car", "a green tree"]
    scores = evaluate_runs.score([finished], prompts, [str(clip)])
    scores += evaluate_runs.score([finished], prompts)
    of_clay = len(shapes.OBJECTS), "a grey clay car"
    assert asked == [(3, "a red car")] * 3 + [of_clay]
    assert [s.judge for s in scores] == [str(clip), "toybox"]
    assert all(0 <= s.colour <= 1 and 0 <= s.geometry <= 1 for s in scores)
    table = evaluate_runs.markdown(scores, len(prompts))
    assert "Of 3 prompts" in table and f"- {clip}: colour " in table


def test_no_such_judge(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"`--clip`: expected the folder or hub .*, got `no/such`"):
        judges.load("no/such")
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a model of type bert"):
        judges.load(str(tmp_path))


def test_open_clip_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ValueError, match=r"package open_clip .*pip install open_clip_torch"):
        judges.load("open_clip:ViT-B-32/laion2b_s34b_b79k")


class TinyOpenClip(torch.nn.Module):
    """What the package open_clip makes, as far as it is used: pictures and texts to colours."""

    def __init__(self):
        super().__init__()
        self.visual = types.SimpleNamespace(
            image_size=(8, 8), image_mean=(0.5, 0.5, 0.5), image_std=(0.25, 0.25, 0.25)
        )

    def encode_image(self, images):
        assert images.shape[1:] == (3, 8, 8)
        return images.mean((2, 3))

    def encode_text(self, tokens):
        return torch.nn.functional.one_hot(tokens[:, 0], 3) * 4.0 - 2.0


def test_open_clip(monkeypatch):
    made = []

    def create_model(name, pretrained):
        made.append((name, pretrained))
        if name == "ViT-X":
            raise RuntimeError("Model config for ViT-X not found.")
        return TinyOpenClip()

    colours = ["red", "green", "blue"]

    def get_tokenizer(name):
        return lambda texts: torch.tensor([[colours.index(t)] for t in texts])

    module = types.SimpleNamespace(create_model=create_model, get_tokenizer=get_tokenizer)
    monkeypatch.setitem(sys.modules, "open_clip", module)
    judge = judges.load("open_clip:ViT-B-32/openai")
    assert made == [("ViT-B-32", "openai")] and judge.image_size == 8
    images = torch.zeros(2, 3, 16, 16)
    images[0, 2], images[1, 0] = 1.0, 1.0
    similar = judge.similarities(images, colours)
    assert similar.argmax(1).tolist() == [2, 0] and similar[0, 2] == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"expected open_clip:MODEL/PRETRAINED, got `open_clip:V"):
        judges.load("open_clip:ViT-B-32")
    with pytest.raises(ValueError, match="`open_clip:ViT-X/y`: Model config for ViT-X not found"):
        judges.load("open_clip:ViT-X/y")


def test_command(tmp_path, grey, finished):
    (tmp_path / "prompts.txt").write_text("a red car\na blue ball\n")
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "judged")]
    result = CliRunner().invoke(cli.app, ["evaluate", "runs", str(finished), *options])
    assert result.exit_code == 0, result.output
    assert "- toybox: colour" in result.output
    assert all((tmp_path / f"judged.{kind}").stat().st_size > 0 for kind in ("md", "json"))
