"""Rollout: the laws of tokens, log-probs and caches, and whole episodes with real tools, played
from a script."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bench_gpu
import rollout as rollout_module
from arft import Config
from conftest import ROOT
from data import mini
from extras import engine, weights
from extras.engine import CLOCK, Rows
from grpo import episode_logp, reference_of, update
from rewards import episode_reward
from rollout import Episode, Limits, RowLayout, begin, collate, rollout, sample_tokens
from tools import Tools

KINDS = (("dark",), ("crop",), ("rotation90", "blur"))


def sampled(policy, samples, tools, group_size=4, seed=0, **limits):
    return rollout(policy, samples, group_size=group_size, tools=tools,
                   limits=Limits(**{"max_new_tokens": 96} | limits),
                   generator=torch.Generator().manual_seed(seed))


def play(monkeypatch, policy, scripts):
    """Makes every row write its script's next turn instead of sampling.

    scripts: a list of turns for each row. A turn that ends in "..." is cut off.
    """
    live = [list(script) for script in scripts]

    def scripted(policy, rows, limits, generator):
        written = []
        for script in live:
            text, end = script.pop(0), [policy.im_end]
            if text.endswith("..."):            # the end-of-turn token is missing
                text, end = text[:-3], []
            ids = policy.text_ids(text) + end
            written.append((ids, [-1.0] * len(ids)))
        return written
    monkeypatch.setattr(rollout_module, "decode_turn", scripted)
    original = Rows.keep

    def keep(self, rows):
        live[:] = [live[i] for i in rows]
        original(self, rows)
    monkeypatch.setattr(Rows, "keep", keep)


def problem(*labels):
    return f"<think>I look.</think>\n<problem>{{{', '.join(repr(l) for l in labels)}}}</problem>"


def code(*lines):
    body = "\n".join(["from PIL import Image", "image = Image.open('path_to_input_image.jpg')",
                      *lines, "image.save('path_to_output_image.jpg')"])
    return f"<think>I repair it.</think>\n<code>\n```python\n{body}\n```\n</code>"


def answer(text):
    return f"<think>I read it.</think>\n<answer>{text}</answer>"


# --- law 1: ids are the truth ---------------------------------------------------------------------


def test_append_takes_everything_or_nothing(samples, policy):
    episode = begin(policy, samples(("dark",)))[0]
    before = (len(episode.ids), len(episode.mask), len(episode.logp), len(episode.images))
    image = episode.images[0]
    for bad in (dict(ids=[1, 2], mask=1, logp=[0.0]), dict(ids=[1], mask=1),
                dict(ids=[1], mask=0, logp=[0.0]),
                dict(ids=[1], mask=1, logp=[0.0], images=[image]),
                dict(ids=[1], mask=0, images=[image]), dict(ids=[1], mask=0, holders=1)):
        with pytest.raises(ValueError):
            episode.append(**bad)
    assert (len(episode.ids), len(episode.mask), len(episode.logp), len(episode.images)) == before


def test_the_mask_marks_what_was_sampled_and_the_end_of_turn(policy, samples, tools):
    for episode in sampled(policy, samples(*KINDS), tools):
        assert len(episode.ids) == len(episode.mask) == len(episode.logp)
        spans = {i for turn in episode.turns for i in range(turn.start, turn.stop)}
        assert {i for i, m in enumerate(episode.mask) if m} == spans
        for turn in episode.turns:
            ids = episode.ids[turn.start:turn.stop]
            assert policy.decode(ids) == turn.text
            assert (ids[-1] == policy.im_end) == turn.finished and policy.im_end not in ids[:-1]
        assert all(p == 0.0 for p, m in zip(episode.logp, episode.mask, strict=True) if not m)


# --- law 2: what was sampled is what is scored ----------------------------------------------------


def largest_difference(policy, episodes):
    batch = collate(policy, episodes)
    with torch.no_grad():
        logp, _ = episode_logp(policy, batch)
    return ((logp - batch.logp_old) * batch.mask).abs().max().item()


def test_sampled_and_scored_log_probs_agree(policy, samples, tools):
    """Over whole episodes with tool images, rows of different lengths and padding, in one batch."""
    episodes = sampled(policy, samples(*KINDS, ("none",)), tools, temperature=1.0)
    assert len({len(e.ids) for e in episodes}) > 3 and len({len(e.turns) for e in episodes}) > 1
    with_tool_image = [e for e in episodes if len(e.images) > 1]
    assert with_tool_image, "without a tool image this would prove nothing"
    assert largest_difference(policy, episodes) < 1e-4


def break_positions(monkeypatch, policy):
    """With two images, positions count tokens in one dimension."""
    true = type(policy).positions

    def positions(ids, images):
        if len(images) < 2:
            return true(policy, ids, images)
        return torch.arange(len(ids)).expand(3, -1)
    monkeypatch.setattr(policy, "positions", positions)


def break_mask(monkeypatch, policy):
    """What lies behind a row's own tokens in the cache is attended to."""
    true = type(policy).hidden

    def hidden(ids, positions, attention, features, cache=None):
        if attention is not None and attention.dim() == 4:
            attention = torch.ones_like(attention)
        return true(policy, ids, positions, attention, features, cache)
    monkeypatch.setattr(policy, "hidden", hidden)


def break_cache(monkeypatch, policy):
    """The prompts are repeated in the wrong order: rows of one sample continue another's cache."""
    true = Rows.repeat

    def repeat(self, times):
        true(self, times)
        for buffer in (buffer for layer in self.cache.buffers for buffer in layer):
            buffer.copy_(buffer.roll(times, dims=0))
    monkeypatch.setattr(Rows, "repeat", repeat)


def break_last_token(monkeypatch, policy):
    """The end-of-turn token is not put into the cache before the observation."""
    true = Rows._lengths

    def lengths(self, rows):
        return [length + (length > 0) for length in true(self, rows)]
    monkeypatch.setattr(Rows, "_lengths", lengths)


@pytest.mark.parametrize("sabotage", [break_positions, break_mask, break_cache, break_last_token])
def test_the_check_notices_a_broken_position_mask_or_cache(policy, samples, tools, monkeypatch,
                                                           sabotage):
    sabotage(monkeypatch, policy)
    assert largest_difference(policy, sampled(policy, samples(*KINDS, ("none",)), tools)) > 1e-3


def test_cached_logits_equal_one_full_forward(policy, samples, tools, monkeypatch):
    """The hidden state after each observation, from the kept cache, against one forward pass over
    all tokens."""
    states = []
    true = Rows.feed

    def feed(self, episodes):
        true(self, episodes)
        states.append(self.newest.clone())
    monkeypatch.setattr(Rows, "feed", feed)
    episodes = sampled(policy, samples(("dark",)), tools, group_size=1, seed=2)
    assert len(states) >= 2
    episode = episodes[0]
    starts = [turn.start for turn in episode.turns]
    batch = collate(policy, episodes)
    with torch.no_grad():
        hidden = policy.hidden(batch.ids, batch.positions, batch.attention,
                               policy.features(batch.images))
        for start, state in zip(starts, states, strict=True):
            torch.testing.assert_close(policy.model.lm_head(state[0]),
                                       policy.model.lm_head(hidden[0, start - 1]),
                                       atol=1e-4, rtol=1e-4)


def test_samples_follow_the_distribution(policy):
    """20,000 draws from one hidden state: the frequencies are the probabilities, within four
    standard errors."""
    hidden = torch.randn(1, policy.model.config.text_config.hidden_size,
                         generator=torch.Generator().manual_seed(1))
    rows = SimpleNamespace(newest=hidden.expand(20_000, -1), count=20_000,
                           batch=torch.arange(20_000))
    with torch.no_grad():
        ids, logp = sample_tokens(policy, rows, 0.7, torch.Generator().manual_seed(0))
        p = policy.log_probs(hidden[0], 0.7).exp()
    torch.testing.assert_close(logp, p[ids].log())
    frequency = torch.bincount(ids, minlength=len(p)) / 20_000
    assert ((frequency - p).abs() <= 4 * (p * (1 - p) / 20_000).sqrt() + 1e-4).all()


def test_greedy_episodes_do_not_depend_on_their_neighbours(policy, samples, tools):
    """Alone or with others, in a group or not: the same greedy episode."""
    three = samples(*KINDS)
    together = sampled(policy, three, tools, group_size=2, temperature=0.0)
    for i, sample in enumerate(three):
        alone = sampled(policy, [sample], tools, group_size=1, temperature=0.0)[0]
        assert alone.ids == together[2 * i].ids == together[2 * i + 1].ids


def test_the_same_seed_gives_the_same_episodes(policy, samples, tools):
    first, again, other = (sampled(policy, samples(*KINDS), tools, seed=s) for s in (5, 5, 6))
    assert [e.ids for e in first] == [e.ids for e in again]
    assert [e.logp for e in first] == [e.logp for e in again]
    assert [e.ids for e in first] != [e.ids for e in other]


def test_masked_tokens_are_never_sampled(policy, samples, tools):
    """Even a policy that wants nothing else cannot write an image placeholder."""
    class Eager(type(policy)):
        def hidden(self, *arguments, **more):
            out = super().hidden(*arguments, **more)
            return out + 100 * self.model.lm_head.weight[self.image_pad]
    eager = Eager(policy.model, policy.tokenizer, policy.image_processor, policy.system_prompt)
    for episode in sampled(eager, samples(("dark",)), tools, max_new_tokens=10):
        sampled_ids = {i for i, m in zip(episode.ids, episode.mask, strict=True) if m}
        assert not sampled_ids & {policy.image_pad, policy.im_start}


# --- the batch: written in place, narrowed, recorded ----------------------------------------------


def same_episodes(first, second):
    assert [e.ids for e in first] == [e.ids for e in second]
    torch.testing.assert_close([p for e in first for p in e.logp],
                               [p for e in second for p in e.logp], atol=1e-4, rtol=0)


def test_a_rows_tokens_fill_its_slots_without_holes(policy, samples, tools, monkeypatch):
    """Whenever something has been fed, each row has exactly its episode's tokens in the cache,
    however ragged the turns were."""
    lengths = []
    true = Rows.feed

    def feed(self, episodes):
        true(self, episodes)
        lengths.append(self.length.tolist())
        assert lengths[-1] == [len(episode.ids) for episode in episodes]
    monkeypatch.setattr(Rows, "feed", feed)
    sampled(policy, samples(*KINDS), tools)
    assert len(lengths) > 2 and len(set(lengths[-1])) > 1


def test_rows_that_leave_during_a_turn_change_nothing(policy, samples, tools, monkeypatch):
    """Narrowed at every chance or never, the same seed samples the same tokens: the draws are made
    for all rows."""
    widths = []
    true = Rows.step

    def step(self, ids):
        widths.append(len(ids))
        return true(self, ids)
    monkeypatch.setattr(Rows, "step", step)
    monkeypatch.setattr(engine, "NARROW_FROM", 1)
    narrowed = sampled(policy, samples(*KINDS), tools)
    assert len(set(widths)) > 3 and min(widths) == 1
    widths.clear()
    monkeypatch.setattr(engine, "NARROW_FROM", 10**9)
    whole = sampled(policy, samples(*KINDS), tools)
    assert widths[0] == 12 and narrowed[0].ids
    same_episodes(narrowed, whole)


@pytest.mark.parametrize("active", ["1100", "0011", "0101", "1000", "0001"])
def test_whoever_is_left_comes_to_the_front(policy, samples, active):
    """Rows that are in front already, so that none has to move, too."""
    rows = Rows(policy, room=8)
    rows.feed(begin(policy, samples(("dark",))))
    rows.repeat(4)
    rows.newest_all += torch.arange(4.0)[:, None]           # to tell the rows from each other
    before, left = rows.newest.clone(), [i for i, on in enumerate(active) if on == "1"]
    rows.begin_turn()
    places = rows._narrow([on == "1" for on in active])
    assert sorted(places.tolist()) == left == sorted(rows.batch.tolist())
    torch.testing.assert_close(rows.newest, before[rows.batch])
    assert len(rows.newest) == len(left)


def test_asking_seldom_who_is_left_changes_nothing(policy, samples, tools, monkeypatch):
    """As on a GPU: up to seven steps that no row needs at the end of a turn. (Greedy, because the
    draws would differ.)"""
    often = sampled(policy, samples(*KINDS), tools, temperature=0.0)
    monkeypatch.setitem(engine.ASK_EVERY, "cpu", 8)
    same_episodes(often, sampled(policy, samples(*KINDS), tools, temperature=0.0))


def test_prompts_prefilled_in_parts_change_nothing(policy, samples, tools, monkeypatch):
    """Two rows at a time, each part with its own images."""
    at_once = sampled(policy, samples(*KINDS), tools)
    longest = max(len(e.ids) for e in begin(policy, samples(*KINDS)))
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 2 * longest)
    calls = []
    true = Rows._forward

    def forward(self, rows, ids, *more):
        calls.append(ids.shape)
        return true(self, rows, ids, *more)
    monkeypatch.setattr(Rows, "_forward", forward)
    same_episodes(at_once, sampled(policy, samples(*KINDS), tools))
    assert [b for b, length in calls if length > 1][:2] == [2, 1]


def static_rows(monkeypatch, recorded):
    """Makes rows decode as on a GPU, each new step going through `recorded`."""
    true = Rows.__init__

    def init(self, *arguments):
        true(self, *arguments)
        self.static = True
    monkeypatch.setattr(Rows, "__init__", init)
    monkeypatch.setattr(engine, "recorded", recorded)


def test_the_step_that_a_gpu_records_is_the_same_step(policy, samples, tools, monkeypatch):
    """The static step of the CUDA graph, run without recording: the same episodes, and one
    recording for each width of a turn."""
    plain = sampled(policy, samples(*KINDS), tools)
    widths = []

    def recorded(step, device):
        widths.append(step.__self__.width)
        return step
    static_rows(monkeypatch, recorded)
    same_episodes(plain, sampled(policy, samples(*KINDS), tools))
    turns = max(len(e.turns) for e in plain)
    assert widths[0] == 12 and 2 <= len(widths) < 3 * turns


class NothingAsked(TorchDispatchMode):
    """Fails on what a CUDA graph cannot hold: a value that the program reads, a tensor that it
    makes from its own numbers."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()      # some have other names in inference mode
        asking = ("local_scalar", "lift_fresh", "masked_select", "is_nonzero", "::nonzero",
                  "::item", "resolve_conj")
        assert not any(word in name for word in asking), name
        chosen = [i for i in (args[1] if name == "aten::index.Tensor" else []) if i is not None]
        assert all(i.dtype != torch.bool for i in chosen), "how many a mask chooses is a value, too"
        return function(*args, **kwargs or {})


def test_the_recorded_step_asks_nothing_and_its_tensors_stay(policy, samples, tools, monkeypatch):
    """Whenever a recording is replayed, its tensors are where they were and as wide, and all slots
    are in its attention."""
    recordings, replayed = [], []

    def recorded(step, device):
        rows, number = step.__self__, len(recordings)

        def state():
            tensors = [rows.ids, rows.length, rows.position, rows.newest_all,
                       *(b for pair in rows.cache.buffers for b in pair)]
            return rows.width, rows.cache.slots, [tensor.data_ptr() for tensor in tensors]

        def replay():
            assert state() == recordings[number]
            with NothingAsked():
                step()
            assert rows.cache.seen == rows.cache.slots
            replayed.append(number)
        recordings.append(state())
        return replay
    static_rows(monkeypatch, recorded)
    sampled(policy, samples(*KINDS), tools)
    assert len(replayed) > 40 and len(set(replayed)) == len(recordings) > 3


def test_bfloat16_samples_and_learns(samples, tools):
    """As on a GPU, with its rounding: a training log-prob is within some hundredths of the sampled
    one, and the statistics say so."""
    policy = weights.load(str(ROOT / "data" / "tiny"), dtype=torch.bfloat16)
    episodes = sampled(policy, samples(*KINDS[:2]), tools, group_size=2, max_new_tokens=32)
    before = [weight.clone() for weight in policy.model.parameters()]
    config = Config(max_new_tokens=32, group_size=2, inner_epochs=2, minibatches=2)
    stats = update(policy, reference_of(policy), episodes, torch.tensor([1.0, -1.0] * 2), config,
                   optimizer=weights.Optimizer(policy, 1e-3, config.max_grad_norm),
                   layout=RowLayout(1024), generator=torch.Generator())
    assert 0 < stats["logp_error"] < 0.2, "rounding shows, and is no more than rounding"
    assert stats["updates"] == 4 and stats["skipped_updates"] == 0
    assert 0 < stats["entropy"] < 1 and stats["kl"] > 0
    after = list(policy.model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(weight.dtype == torch.bfloat16 and weight.isfinite().all() for weight in after)


def test_the_benchmark_samples_as_the_rollout_does(capsys):
    """tests/measure/bench_gpu.py measures the rollout's own loop: its episodes' log-probs are those
    of one forward pass over their tokens."""
    bench = bench_gpu.make_policy("tiny")
    args = Namespace(device="cpu", samples=2, group=2, turns=3, tokens=5, side=56,
                     micro_batch_tokens=512, generate="on")
    bench_gpu.report(bench, args)
    said = capsys.readouterr().out
    words = ("decode", "bandwidth", "generate", "update", "whole step", "MAT-Coding, 200")
    assert all(word in said for word in words)
    assert not bench.barred[bench.im_end]
    bench.barred[bench.im_end] = True
    prompts, replies = bench_gpu.make_prompts(bench, args), bench_gpu.observations(bench, args)
    episodes = bench_gpu.sample_ours(bench, prompts, replies, args, bench_gpu.Meter("cpu"), "on")
    assert [sum(e.mask) for e in episodes] == [15] * 4 and len(episodes[0].images) == 2
    assert largest_difference(bench, episodes) < 1e-4


# --- whole episodes, from a script ----------------------------------------------------------------


def test_a_right_episode_gets_its_image_its_answer_and_full_reward(policy, samples, tools,
                                                                   monkeypatch):
    sample, = samples(("rotation90",))
    gold = sample.golds[0]
    play(monkeypatch, policy,
         [[problem("rotation90"), code("image = image.rotate(-90)"), answer(gold)]])
    episode, = sampled(policy, [sample], tools, group_size=1)
    assert [t.action.kind for t in episode.turns] == ["problem", "code", "answer"]
    replies = [rollout_module.REPLY_PROBLEM, rollout_module.REPLY_IMAGE, None]
    assert [t.observation for t in episode.turns] == replies
    assert episode.answer == gold and episode.ended == "answer" and len(episode.images) == 2
    shown, turned = (torch.tensor(list(image.tobytes())).float()
                     for image in (episode.view, sample.open_image().rotate(-90)))
    assert (shown - turned).abs().mean() < 6    # the program saved a JPEG: nearly the same picture
    reward = episode_reward(episode)
    assert [reward.parts[name] for name in ("answer", "format", "problem")] == [1.0, 1.0, 1.0]


def test_answering_at_once_is_worth_less_than_working(policy, samples, tools, monkeypatch):
    """On an unreadable image a policy without code can hope for the format's reward alone."""
    sample, = samples(("dark",))
    gold = sample.golds[0]
    wrong = "13" if gold != "13" else "14"
    repair = code("image = image.point(lambda v: v * 6)")
    play(monkeypatch, policy, [[answer(wrong)], [problem("dark"), repair, answer(gold)]])
    lazy, working = sampled(policy, [sample], tools, group_size=2)
    assert episode_reward(lazy).total == 1.0 and episode_reward(working).total == 3.0


def test_what_goes_wrong_goes_back_to_the_model(policy, samples, tools, monkeypatch):
    play(monkeypatch, policy, [
        [code("raise ValueError('no')"), answer("1")],
        [code("image = image.rotate("), answer("1")],
        ["no tags at all", answer("1")],
        ["<think>I search.</think><search>x</search>", answer("1")],
        [problem("none"), answer("1")]])
    episodes = sampled(policy, samples(("dark",)), tools, group_size=5)
    said = [e.turns[0].observation for e in episodes]
    assert "ValueError" in said[0] and "SyntaxError" in said[1]
    assert said[2].startswith("Not understood: ")
    assert said[3] == rollout_module.REPLY_NO_SEARCH and said[4] == rollout_module.REPLY_NONE
    assert all(e.answer == "1" and len(e.images) == 1 for e in episodes)


def test_a_second_program_works_on_the_first_ones_image(policy, samples, tools, monkeypatch):
    half = code("image = image.resize((image.width // 2, image.height // 2))")
    play(monkeypatch, policy, [[half, half, answer("1")]])
    episode, = sampled(policy, samples(("none",)), tools, group_size=1)
    assert [t.execution.image.size for t in episode.turns[:2]] == [(56, 56), (28, 28)]


def test_equal_programs_of_a_group_share_one_image(policy, samples, tools, monkeypatch):
    turn = code("image = image.rotate(180)")
    play(monkeypatch, policy, [[turn, answer("1")]] * 3)
    episodes = sampled(policy, samples(("none",)), tools, group_size=3)
    assert len({id(e.images[1]) for e in episodes}) == 1


def test_with_tools_off_the_image_stays_as_it_was(policy, samples, monkeypatch):
    sample, = samples(("dark",))
    play(monkeypatch, policy, [[code("image = image.point(lambda v: v * 6)"), answer("1")]])
    episode, = sampled(policy, [sample], Tools(), group_size=1)
    assert episode.view.tobytes() == sample.open_image().tobytes() and len(episode.images) == 2


# --- how episodes end -----------------------------------------------------------------------------


def test_every_way_to_end(policy, samples, tools, monkeypatch):
    play(monkeypatch, policy, [[answer("1")], [problem("dark")] * 3, [answer("12345") + "..."],
                               [problem("dark") + "...", answer("1")]])
    episodes = sampled(policy, samples(("dark",)), tools, group_size=4, max_turns=3)
    assert [e.ended for e in episodes] == ["answer", "turns", "cut", "cut"]
    assert [e.answer for e in episodes] == ["1", None, None, None], "a cut answer is none"
    assert episodes[1].turns[-1].observation is None


def test_an_observation_that_does_not_fit_ends_the_episode_before_it(policy, samples, tools,
                                                                     monkeypatch):
    """Nothing is truncated, an image least of all: tokens and images stay as they were (law 5)."""
    sample, = samples(("dark",))
    turn = code("image = image.rotate(180)")
    prompt = len(begin(policy, [sample])[0].ids)
    room = prompt + len(policy.text_ids(turn)) + 1 + 8
    play(monkeypatch, policy, [[turn, answer("1")]])
    episode, = sampled(policy, [sample], tools, group_size=1, max_length=room)
    assert episode.ended == "length" and len(episode.ids) <= room and len(episode.images) == 1
    assert episode.ids.count(policy.image_pad) == policy.image_tokens(episode.images[0])


def test_the_clock_counts_every_phase(policy, samples, tools):
    CLOCK.take()
    sampled(policy, samples(("dark",)), tools, group_size=2, max_new_tokens=64)
    assert set(CLOCK.take()) >= {"vision", "prefill", "decode", "tools"}


def test_an_empty_episode_has_no_answer(samples):
    assert Episode(samples(("dark",))[0]).answer is None
    assert set(mini.texts("train")).isdisjoint(mini.texts("test"))
