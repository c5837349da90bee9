"""The assignments as data: what `make` takes out, what `grade` runs, what a student reads.

They are in the order of the README's lesson. The tests of task N are in test_task_NN.py in this
folder. The docstring of a function is its exact specification: a task needs nothing that is written
elsewhere.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    number: int
    title: str
    functions: tuple[tuple[str, str], ...]      # (file, function or Class.method), in this order
    write: str                                  # what to write, and what it is for
    minutes: int                                # for you, if you know PyTorch but no RL
    question: str                               # open; its answer is a number from a short run

    @property
    def test(self) -> str:
        return f"tests/coursework/test_task_{self.number:02d}.py"


TASKS = (
    Task(1, "A turn becomes an action", (("tools.py", "parse"),),
         "Write the last step of the parser, from the text of a turn to an Action. `read_tags`, "
         "`read_labels`, `read_program` and `is_strict` are there. Whatever a model writes, "
         "`parse` must not raise.", 20,
         "`python arft.py --task mat-coding --steps 6 --eval-samples 20 --out runs/six` trains for "
         "six steps. Which share of the turns of step 1 in runs/six/episodes.jsonl (`when` is "
         "step-1) is malformed, and which share of the turns of step 6? Why does this part of the "
         "reward move first?"),
    Task(2, "An episode grows", (("rollout.py", "Episode.append"),),
         "Write the one method through which the token ids, mask, log-probs and images of an "
         "episode grow, together or not at all.", 20,
         "The folder runs/six of task 1 has tokens.jsonl, with a row for each episode of the first "
         "group of each step (`count` says how many equal tokens an entry stands for). Which share "
         "of all tokens there has mask 1, so that the model is taught something?"),
    Task(3, "What an answer is worth",
         (("rewards.py", "tokens"), ("rewards.py", "harmonic"), ("rewards.py", "f1")),
         "Write the paper's token F1, quirk included. `normalize` is there.", 20,
         "F1 can be gamed. Somebody cannot read the sign and answers with all 20 held-out numbers "
         "of `data.mini.texts('test')` instead of guessing one. The list earns how many times the "
         "expected reward of the guess (`score_answer`)?"),
    Task(4, "Better than the group", (("grpo.py", "group_advantages"),),
         "Write the group advantages: the policy does not learn from a reward, but from how much "
         "better it is than the other rewards of the same sample.", 25,
         "A group whose rewards are all equal teaches nothing. `zero_variance` in metrics.jsonl is "
         "the share of such groups. What is it at the first step with `--group-size 2 "
         "--samples-per-step 32`, and with the default 8 groups of 8 (both are 64 episodes)?"),
    Task(5, "How far from the reference", (("grpo.py", "k3"), ("grpo.py", "_token_means")),
         "Write the KL term of one token, and the mean that is logged.", 20,
         "What is `kl` at step 6 of runs/six, and what is it with `--beta 1` instead of 0.04?"),
    Task(6, "The clipped loss", (("grpo.py", "clipped_objective"), ("grpo.py", "_aggregate")),
         "Write PPO's clipped objective of each token, and the average over the tokens of a batch. "
         "`policy_loss` puts the two together.", 30,
         "Which `clip_fraction` does step 1 of runs/six have, and which with `--inner-epochs 4`? "
         "Which must it have with `--inner-epochs 1 --minibatches 1`?"),
    Task(7, "Where an image stands", (("policy.py", "Policy.positions"),),
         "Write Qwen2.5-VL's positions in three dimensions, for a whole conversation with images.",
         30,
         "Let the text after an image start at p + rows * columns instead of p + max(rows, "
         "columns), and evaluate with `python arft.py --task mat-coding --eval-only --eval-samples "
         "98 --out runs/shifted`. Which greedy EM does the policy have on these 98 simple samples "
         "before the change, and which after it? Why does `logp_error` not show this mistake?"),
    Task(8, "A layer of the sandbox", (("extras/jail.py", "limit_resources"),),
         "Write the limits that the kernel keeps for a program that a model wrote.", 25,
         "Run the program that repairs `rotation90` (`data.mini.program`) in `Sandbox(workers=1, "
         "memory_mb=m)`. Which is the smallest power of two m with which it works on a picture of "
         "4000 x 3000 pixels? How many copies of the picture is that?"),
    Task(9, "Searches that can be repeated", (("extras/search.py", "Replay.search"),),
         "Write a record of searches that stands in front of a search engine. You need a little "
         "SQL: SELECT and INSERT OR REPLACE.", 30,
         "Run `python arft.py --task mat-search --eval-only --eval-samples 20 --replay "
         "runs/record.sqlite --out runs/search`, then once more with another --out. How many "
         "searches did the record answer in the first run, and how many in the second? (`Replay` "
         "counts `hits` and `misses`, and each run records them as `searches`.)"),
    Task(10, "A problem, from drawing to reward",
         (("data/mini.py", "noise"), ("rewards.py", "problem_reward")),
         "Write how an image is made unreadable, and what naming the problem is worth. Then comes "
         "the open part: add a problem of your own, `mirror` (the sign left to right), to SINGLES, "
         "`damage` and REPAIRS in data/mini.py (raise VERSION there, or an old data/cache is used "
         "without it) and to PROBLEMS in data/mat.py. The tests look at every problem that they "
         "find there.", 40,
         "Draw ten mirrored signs. Apply your repair to each of them, then the first wording of "
         "every other repair, then none. How many grey levels (mean absolute difference to the "
         "clean sign) is each off? Which number says that this does not measure whether you can "
         "read the sign?"),
)
