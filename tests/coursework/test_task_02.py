"""Task 2: rollout.Episode.append."""

from functools import partial

from rollout import Episode

from .check import expect

IMAGE = object()        # append only stores it


def grown():
    episode = Episode(sample=None)
    episode.append([10, 11, 12], mask=0, images=[IMAGE], holders=1)
    episode.append([20, 21], mask=1, logp=[-0.5, -0.25])
    episode.append([30], mask=0)
    return episode


def test_the_three_lists():
    ids, mask = [10, 11, 12, 20, 21, 30], [0, 0, 0, 1, 1, 0]
    logp = [0.0, 0.0, 0.0, -0.5, -0.25, 0.0]

    def lists():
        episode = grown()
        return episode.ids, episode.mask, episode.logp
    expect(lists, (ids, mask, logp), {
        "prompt and observation have mask 1: the loss would teach the model to write what the "
        "tools say": (ids, [1] * 6, logp),
        "the last sampled id has mask 0: the end of a turn is an action, too":
            (ids, [0, 0, 0, 1, 0, 0], logp),
        "the mask has one entry for each piece, not for each id": (ids, [0, 1, 0], logp),
        "the log-probs have no entry for what was not sampled: all three lists must have one "
        "length": (ids, mask, [-0.5, -0.25]),
        "a new piece replaces what was there": ([30], [0], [0.0]),
    }, "prompt, turn, observation")


def test_images_are_kept():
    expect(lambda: len(grown().images), 1, {
        "the images are not kept": 0,
        "images are None if a piece brings none": "raised TypeError",
    }, "one image")


def test_two_episodes_share_nothing():
    def prompt_after_a_turn():
        prompt = [1, 2]
        episode = Episode(sample=None)
        episode.append(prompt, mask=0)
        episode.append([3], mask=1, logp=[-1.0])
        return prompt
    expect(prompt_after_a_turn, [1, 2], {
        "the episode keeps the caller's own list and grows it: a prompt's list is shared by its "
        "whole group": [1, 2, 3],
    }, "the list that was passed in")


def reply_to(*arguments, **names) -> str:
    """What append does with a piece: "taken", "refused", or "refused too late"."""
    episode = Episode(sample=None)
    try:
        episode.append(*arguments, **names)
        return "taken"
    except ValueError:
        grown = episode.ids or episode.mask or episode.logp or episode.images
        return "refused too late" if grown else "refused"


def test_what_does_not_fit_is_refused():
    later = ("the episode has grown before append raises: check everything first, together or not "
             "at all")
    for words, ids, names in (
            ("sampled ids without log-probs are taken", [1, 2], {"mask": 1}),
            ("sampled ids with too few log-probs are taken", [1, 2], {"mask": 1, "logp": [-1.0]}),
            ("sampled ids may bring no image", [1],
             {"mask": 1, "logp": [-1.0], "images": [IMAGE], "holders": 1}),
            ("ids that were not sampled have no log-probs, here they are taken", [1],
             {"mask": 0, "logp": [-1.0]}),
            ("placeholders without an image are taken", [1, 2], {"mask": 0, "holders": 2}),
            ("an image without placeholders is taken", [1, 2], {"mask": 0, "images": [IMAGE]})):
        expect(partial(reply_to, ids, **names), "refused",
               {words: "taken", later: "refused too late"}, words)
