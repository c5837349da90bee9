"""A group as one packed tree against its episodes row by row: the same
log-probs, losses, gradients, updates."""

import pytest
import torch

import rollout
from data.mat import StepSample
from extras import paper
from extras.tree import TreeLayout, groups_of, sight, tree, tree_length
from grpo import episode_logp, frozen_logp, group_advantages, policy_loss, reference_of
from rollout import Episode, Limits, RowLayout, collate, cut
from test_grpo import gradient_of, layout_of, options
from test_policy import photograph


def written(policy, prompt: Episode, seed: int, turns: list[tuple[int, bool]]) -> Episode:
    """The prompt's episode, continued: for each turn so many sampled ids,
    and whether an image comes back."""
    g = torch.Generator().manual_seed(seed)
    allowed = (~policy.barred).nonzero()[:, 0]
    episode = Episode(None, list(prompt.ids), list(prompt.mask), list(prompt.logp),
                      list(prompt.images))
    for number, (length, image) in enumerate(turns):
        ids = allowed[torch.randint(len(allowed), (length,), generator=g)].tolist()
        episode.append(ids, mask=1, logp=(-6 - torch.rand(length, generator=g)).tolist())
        if number + 1 < len(turns):
            images = [policy.image_input(photograph(56, 56, seed=seed))] if image else []
            episode.append(policy.observation_ids("This is the image now.", images), mask=0,
                           images=images,
                           holders=sum(map(policy.image_tokens, images)))
    return episode


def begun(policy, question: str, images: int) -> Episode:
    prompt, views = Episode(None), [policy.image_input(photograph(112, 56, seed=i))
                                    for i in range(images)]
    prompt.append(policy.prompt_ids(question, views), mask=0, images=views,
                  holders=sum(map(policy.image_tokens, views)))
    return prompt


@pytest.fixture
def episodes(fresh_policy):
    """Three groups with 1, 0 and 2 images in their prompts, 4, 3 and 1 episodes (the others were
    dropped), ragged, with and without images in later turns, in no order."""
    first, second, third = (begun(fresh_policy, words, images)
                            for words, images in (("What is it?", 1), ("So?", 0),
                                                  ("Which one?", 2)))
    made = [written(fresh_policy, first, 1, [(5, True), (9, False), (3, False)]),
            written(fresh_policy, second, 2, [(1, False)]),
            written(fresh_policy, first, 3, [(17, False)]),
            written(fresh_policy, third, 4, [(4, True), (2, True), (6, False)]),
            written(fresh_policy, first, 5, [(2, True), (1, True), (1, False)]),
            written(fresh_policy, second, 6, [(8, False), (8, False)]),
            written(fresh_policy, first, 7, [(1, False)]),
            written(fresh_policy, second, 8, [(3, True), (2, False)])]
    assert len({len(e.ids) for e in made}) > 5
    return made


GROUPS = [[0, 2, 4, 6], [1, 5, 7], [3]]


def test_what_a_tree_looks_like(fresh_policy):
    """Prompt of P ids, then two branches of 2 and 3: written out, for a prompt without an image."""
    prompt = begun(fresh_policy, "?", 0)
    a, b = written(fresh_policy, prompt, 1, [(2, False)]), written(fresh_policy, prompt, 2,
                                                                   [(3, False)])
    batch, P = tree(fresh_policy, [a, b]), len(prompt.ids)
    assert batch.ids.shape[0] == 1 and batch.ids.shape[1] % 8 == 0
    assert batch.ids[0, :P + 5].tolist() == prompt.ids + a.ids[P:] + b.ids[P:]
    assert batch.positions[:, 0, :P + 5].tolist() == [[*range(P), P, P + 1, P, P + 1, P + 2]] * 3
    # the prompt's last id predicts two
    assert batch.states.tolist() == [P - 1, P, P - 1, P + 2, P + 3]
    assert batch.targets.tolist() == a.ids[P:] + b.ids[P:]
    seen = batch.attention[0, 0]
    assert seen[:P, :P].equal(torch.ones(P, P, dtype=torch.bool).tril()) and not seen[:P, P:].any()
    # a's second
    assert seen[P + 1].nonzero()[:, 0].tolist() == [*range(P), P, P + 1]
    # b's second does not see a
    assert seen[P + 3].nonzero()[:, 0].tolist() == [*range(P), P + 2, P + 3]


def test_padding_is_seen_by_nobody_and_sees_something():
    """A row that sees nothing would be a softmax over nothing: not a number,
    also in the gradient of the others."""
    seen = sight(torch.tensor([[0, 0, 1, -1, -1]]))[0, 0]
    assert seen.any(dim=1).all() and not seen[:3, 3:].any()


def test_groups_are_found_by_prompt_and_images(fresh_policy, episodes):
    assert groups_of(fresh_policy, episodes) == GROUPS
    # equal ids and pixels, but another sample's image
    same_words = begun(fresh_policy, "What is it?", 1)
    assert groups_of(fresh_policy, [*episodes,
                                    written(fresh_policy, same_words, 1, [(2, False)])])[-1] == [8]


@pytest.mark.parametrize("members", [range(8), [3], [6, 1], [0, 2, 4, 6]])
def test_log_probs_and_gradients_are_those_of_rows(fresh_policy, episodes, members):
    """To 1e-5 in float32: log-probs, entropies, the loss, and the gradient
    of every weight, the tower's included."""
    episodes, A = [episodes[i] for i in members], torch.linspace(-1, 1.3, len(members))
    results = []
    for layout in (RowLayout(), TreeLayout()):
        batch = layout.pack(fresh_policy, episodes)
        logp, entropy = episode_logp(fresh_policy, batch, 0.8)
        loss, _ = policy_loss(logp, logp.detach() - 0.1, logp.detach() + 0.2, A, batch.mask)
        gradient = torch.autograd.grad(loss, list(fresh_policy.model.parameters()),
                                       allow_unused=True)
        results.append((batch.mask, batch.logp_old, batch.targets, logp, entropy, loss,
                        *(g if g is not None else torch.zeros(()) for g in gradient)))
    assert results[0][3].abs().max() > 1 and results[0][-1].abs().max() > 0
    for rows, trees in zip(*results):
        torch.testing.assert_close(trees, rows, atol=1e-5, rtol=1e-5)


def test_a_branch_does_not_depend_on_its_neighbours(fresh_policy, episodes):
    """Change another branch and the padding: the same log-probs to the last
    digit that padding allows."""
    other = written(fresh_policy, begun(fresh_policy, "?", 0), 9, [(1, False)])
    with torch.no_grad():
        one, _ = episode_logp(fresh_policy, tree(fresh_policy, [episodes[0], episodes[2]]))
        two, _ = episode_logp(fresh_policy,
                              tree(fresh_policy, [other, episodes[4], episodes[0], episodes[6]]))
    L = len(episodes[0].ids)
    torch.testing.assert_close(one[0, :L], two[2, :L], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_an_update_is_the_same_as_a_tree_and_however_it_is_cut(fresh_policy, episodes, loss_type):
    """Whole updates with a reference: one forward pass for all, groups
    apart, groups cut, each episode alone."""
    reference = reference_of(fresh_policy)
    with torch.no_grad():
        reference.model.lm_head.weight.mul_(1.1)
    A = group_advantages(torch.arange(8.0), 4)
    rows = gradient_of(fresh_policy, reference, episodes, A, options(loss_type=loss_type))
    for layout, limit in (("rows", 1), ("tree", 10 ** 6), ("tree", 220), ("tree", 100),
                          ("tree", 1)):
        config = options(loss_type=loss_type, update=layout, micro_batch_tokens=limit)
        got = gradient_of(fresh_policy, reference, episodes, A, config)
        assert (got - rows).abs().max() < 1e-5 * max(1, rows.abs().max())


def test_the_reference_is_the_same(fresh_policy, episodes):
    plain = frozen_logp(fresh_policy, episodes, 1.0, layout_of(options()))
    for limit in (10 ** 6, 220, 1):
        trees = frozen_logp(fresh_policy, episodes, 1.0, TreeLayout(limit))
        for one, other in zip(plain, trees):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", [RowLayout, TreeLayout])
def test_micro_batches_keep_to_their_limit(fresh_policy, episodes, layout):
    """Every episode once; no forward pass over the limit, padding included,
    unless one episode is."""
    whole = tree_length(fresh_policy, [episodes[i] for i in GROUPS[0]])
    longest = max(len(e.ids) for e in episodes)
    for limit in (1, longest, longest + 60, whole, 3 * whole):
        parts = layout(limit).micro_batches(fresh_policy, episodes)
        assert sorted(i for part in parts for i in part) == list(range(8))
        for part in parts:
            batch = layout(limit).pack(fresh_policy, [episodes[i] for i in part])
            rows, length = batch.ids.shape
            # - 7: a tree's length is a multiple of 8
            assert rows * (length - 7) <= limit or len(part) == 1
        if layout is TreeLayout and limit >= whole:
            assert any(set(GROUPS[0]) <= set(part)
                       for part in parts), "a group that fits was torn apart"
    assert len(layout(1).micro_batches(fresh_policy, episodes)) == 8
    assert len(layout(10 ** 6).micro_batches(fresh_policy, episodes)) == 1


def test_cutting_by_hand():
    assert cut([7], 3) == [[0]]
    assert cut([4, 4, 4, 4, 4], 8) == [[0, 1], [2, 3], [4]]
    assert cut([9, 1, 2, 3], 9) == [[1, 2, 3], [0]]


def test_minibatches_of_trees_are_whole_groups(fresh_policy, episodes):
    """In rows any episode goes anywhere; as trees groups stay together; both
    in a random order from the generator."""
    def drawn(update, count, seed):
        return layout_of(options(update=update)).minibatches(
            fresh_policy, episodes, count, torch.Generator().manual_seed(seed))
    for update in ("rows", "tree"):
        for count in (1, 2, 3):
            assert sorted(i for part in drawn(update, count, 0) for i in part) == list(range(8))
    assert all(part in GROUPS for part in drawn("tree", 3, 0)) and len(drawn("tree", 9, 0)) == 3
    assert len({str(drawn("tree", 3, seed)) for seed in range(9)}) > 1
    assert any(part not in GROUPS for part in drawn("rows", 3, 0))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(4))
    assert drawn("rows", 2, 4) == [order[:4].tolist(), order[4:].tolist()]


@pytest.mark.parametrize("protocol", ["episodes", "paper"])
def test_real_groups_share_their_prompts(fresh_policy, samples, tools, protocol):
    """What rollout and paper.rollout return are groups; scored as trees, ids
    have the log-probs of their sampling."""
    drawn = samples(("dark",), ("rotation90", "noise"))
    if protocol == "paper":
        drawn = [StepSample(**vars(sample), kind="answer", context="<think> I look. </think>")
                 for sample in drawn]
    play = rollout.rollout if protocol == "episodes" else paper.rollout
    episodes = play(fresh_policy, drawn, group_size=3, tools=tools,
                    limits=Limits(max_new_tokens=60),
                    generator=torch.Generator().manual_seed(1))
    assert groups_of(fresh_policy, episodes) == [[0, 1, 2], [3, 4, 5]]
    batch = tree(fresh_policy, episodes)
    with torch.no_grad():
        logp, _ = episode_logp(fresh_policy, batch)
    assert ((logp - batch.logp_old) * batch.mask).abs().max() < 1e-4


def test_a_tree_holds_each_prompt_once(fresh_policy, episodes):
    rows = collate(fresh_policy, episodes)
    assert int((rows.attention == 1).sum()) == sum(len(e.ids) for e in episodes)
    used = [tree_length(fresh_policy, [episodes[i] for i in group]) for group in GROUPS]
    prompts = sum((len(group) - 1) * episodes[group[0]].mask.index(1) for group in GROUPS)
    assert sum(used) == sum(len(e.ids) for e in episodes) - prompts
    images = tree(fresh_policy, episodes).images
    assert len(images) == len(set(images)) < len(rows.images)
