"One vocabulary: a parameter has one name, one kind and one meaning in all stages; 0 is zero."

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

import recnb
from recnb import stages

WORDS = """
align: what is aligned: hidden states, or the distribution of the next token
analysis: folder with comparisons of published predictions
answer_attempts: answers asked for before a question has failed
api_key_variable: environment variable with a server's key
as_shipped: also the released variant, which has seen labels
backoff: first wait between requests, seconds
bagging_fraction: share of the pairs that a tree sees
base_url: address of a server
batch_by: which prompts meet in a step
batch_size: rows that go through a model at a time
batch_tokens: tokens that go through a model at a time, those it will write included
beta: weight of the KL divergence
bounding_box: part of the map to read, degrees
calibrate: whether probabilities are divided by those after a blank prompt
candidates: folder with rankings whose best POIs a model is asked about
category_dim: width of a category's embedding
city: one of the cities of a dataset
collective: whether the prompt says where people go next
columns: which column of a file is what
compact_history: whether earlier check-ins are told as weekday, hour and POI
concurrency: requests under way at a time
context_stays: latest stays of the current trajectory in a prompt
data: file, folder or name of a dataset's files
dataset: which dataset
dataset_id: published prompts, by their Hub id
device: where a model runs
distance: between two hidden states
domain: noun for an item in a prompt
dropout: share of activations set to 0 in training
dtype: number type of a model
duplicates: what happens to a repeated row
early_stopping: epochs without a better score before training stops
embedding_dim: width of an embedding
enable_thinking: whether a server's chat template lets a model think
encoder: what turns texts into vectors
encoding: text encoding of a source's files
epsilon: where ratios of probabilities are clipped
eval_steps: steps between looks at validation rows
evaluate: folder with a model's answers to the test prompts
evaluate_validation: folder with a model's answers to the validation prompts
excluded_features: groups of features left out
feature_fraction: share of the features that a tree sees
feedforward_dim: width of the feed-forward layers
filter_rounds: passes of the frequency filters
first_rows: only the first rows of a table
frame: the chat frame of prompts
fsdp: whether weights are sharded over processes
gcn_dims: widths of the graph layers
generation_batch_size: completions written at a time
geocoder: what names a place
gradient_accumulation_steps: batches in a step of the optimiser
gradient_checkpointing: whether activations are computed again
held_out_rows: rows kept out of training to be watched
history_stays: earlier stays in a prompt
history_until: last split whose check-ins may be looked at
hourly_candidates: candidates that are popular at the hour
id_bound: upper bound of an id that a question names
inner_weight: weight of a train target inside a trajectory
isolation_minutes: a check-in further than this from all others is left out
json_mode: how a server is told to send JSON
k_core: ratings that each user and item must have
kd_ratio: weight of the alignment beside cross-entropy
kd_temperature: what softens two distributions
keep_ties: whether rows of the target's own moment stay visible
keep_untrained: whether the model as it came may be chosen
kernel_hours: width of a kernel over the hours
lambda_l2: penalty on the values of leaves
lambdarank_truncation_level: places whose exchanges count
latency_rows: rows that are timed
learning_rate: size of a step of training
learning_share: share of the users that a model learns from
leave_own_out: whether a train step sees its own transition
level: p below which a difference counts
like_threshold: rating from which an item is liked
lora_alpha: scale of an adapter
lora_dropout: dropout on an adapter's input
lora_r: rank of an adapter
loss_type: how the loss of GRPO is averaged
lr_scheduler_type: course of the learning rate after its rise
map_dim: width inside the transition map
max_checkins: check-ins in a prompt at most
max_checkins_per_trajectory: check-ins of a trajectory at most
max_grad_norm: norm to which gradients are clipped
max_history: recent ratings in a prompt at most
max_item_tokens: tokens of an item in a prompt at most
max_iter: iterations of k-means at most
max_length: tokens of prompt and answer at most
max_neighbours: trajectories that a prefix looks at, at most
max_new_tokens: tokens that a model writes at most
max_prompt_length: tokens of a prompt at most
max_steps: steps of training at most
max_successors: next POIs in a prompt at most
max_think_tokens: tokens of a reasoning at most
max_trajectories: trajectories in a prompt at most
max_trajectory_tokens: tokens of a trajectory at most
memory: whether the prompt says what the user's stays show
meta: Amazon's file of what is known of items
method: whose prompt, as it is named in the tables
min_data_in_leaf: pairs in a leaf at least
min_history: ratings before a user's first row at least
min_jaccard: overlap of two trajectories at least
min_poi_freq: check-ins of a POI above which it stays
min_user_freq: check-ins of a user above which they stay
mode: which of a stage's ways to answer
model_checkpoint: language model: a name, a folder or a Hub id
modules_to_save: modules trained whole beside an adapter
n_clusters: topics
n_init: restarts of k-means
near_candidates: candidates that are near
neighbour_sampling: which trajectories are looked at
nominatim: address of a server that names places
num_candidates: candidates that a prompt tells
num_cuts: moments inside train at which the history is frozen
num_days: days of a made city
num_epochs: passes over the train rows
num_folds: parts into which the users are cut for cross-validation
num_generations: completions per prompt
num_heads: heads of attention
num_items: made items
num_layers: layers of a model
num_leaves: leaves of a tree
num_models: models whose scores are averaged
num_pois: made venues
num_trees: trees at most
num_users: made people
num_workers: processes that put steps together
other_users: whether published profiles may be of other users
out: folder to write
pause: seconds between requests
poi_dim: width of a POI's embedding
popular_candidates: candidates that are popular
predictions: file of answers that another program made
preset: published settings of sampling
price_completion: US$ for a million completion tokens
price_prompt: US$ for a million prompt tokens
profile: how much of a profile is in the prompt
prompts_per_step: prompts of a step
provider: who answers
published: folder with printed numbers
quantization: whether weights have four bits
rank_limit: ranks that are told exactly
ranker: folder with a ranker's rankings
rate_drop_growth: factor on the time to the next drop of the learning rate
rate_drop_step: first step at which the learning rate drops
ratings_per_user: made ratings of a person
rationales: which rationales teach
raw_features: whether features are left as they are
reasonings: file with reasoning of train instances
released_axis: whether attention runs along the released axis
repetition_penalty: of tokens that were written before
replay: file with recorded answers
report_to: tracker of training runs
request_attempts: requests before an answer has failed
revision: commit, tag or branch on the Hub
save_steps: steps between checkpoints
scale: lowest and highest rating of the source
scheduler_factor: factor on the learning rate at a drop
scheduler_patience: epochs that are tolerated before a drop
score: which log-probability ranks
seed: of every draw
separator: what stands between the fields of a text table
session_time_interval: pause after which a trajectory ends, minutes
share_prompts: whether a group's prompt is computed once
sketch_rule: which sketch of a history
skip_bad_rows: whether rows that cannot be read are left out and listed
source: published profiles
source_dataset: dataset of published profiles
split: rows that are asked
states: rationales whose last hidden state is kept
stored: file of published predictions
successor_candidates: candidates that often follow
tag_tokens: whether an answer tag is one token
target_modules: modules that get an adapter
teacher: whose hidden states teach
temperature: of sampling; 0 is greedy
template: wording of prompts
test_file: name of a dataset's test file
test_rows: test rows to draw
test_sees_validation: whether a test row sees the validation rating
thinking_tokens: tokens for reasoning before an answer
threads: CPU threads, which move the last bits
ties: who is first among equal counts
time_dim: width of the time's embedding
time_format: how the times of a source are written
time_weight: weight of the loss of the next time
timeout: seconds for one answer
tokenizer: model whose tokenizer counts tokens
top_k: how many of the likeliest or nearest are looked at
top_p: share of the probability that is drawn from
torch_compile: whether layers are compiled
train_file: name of a dataset's train file
train_rows: train rows to draw
training_ratio: share of the train rows to draw
tuning: adapter, adapter on four bits, or all weights
typical_p: share of the most typical tokens that is drawn from
use_cot: whether an answer reasons first
use_liger_kernel: whether Liger's kernels are used
use_long_history: whether the sketch of the history is in the prompt
use_target_time: whether the time of the target is known
user_dim: width of a user's embedding
validation_file: name of a dataset's validation file
validation_rows: validation rows to draw
vllm_mode: where vLLM writes completions, if it does
vllm_server_base_url: address of the server that writes completions
warmup_steps: steps on which the learning rate rises
weight_decay: of the optimiser
weights: weights of a log-probability to choose among
world: whether the prompt says what the model knows of places
"""
MEANINGS = dict(line.split(": ", 1) for line in WORDS.strip().splitlines())
# of these a study may want none, and 0 says so
COUNTS_FROM_ZERO = {
    "held_out_rows",
    "latency_rows",
    "max_history",
    "max_neighbours",
    "warmup_steps",
}


def all_stages():
    home = Path(recnb.__file__).parent
    for file in sorted(home.glob("*/*.py")):
        if "@stage(" in file.read_text():
            yield importlib.import_module(f"recnb.{file.parent.name}.{file.stem}").run


ANY_NUMBER = {"bounding_box", "like_threshold"}  # degrees; a rating of any scale
STAGES = list(all_stages())
FOLDERS = {run.stage.split(".")[1] for run in STAGES}  # a parameter of that name is its folder


def test_every_name_is_in_the_vocabulary_and_none_is_left_over():
    used = {f.name for run in STAGES for f in dataclasses.fields(run.Params)}
    stages_read = FOLDERS - MEANINGS.keys()
    assert used - stages_read == MEANINGS.keys()


def test_one_name_has_one_kind():
    kinds = {}
    for run in STAGES:
        for name, kind in stages._kinds_of(run.Params).items():
            kinds.setdefault(name, {}).setdefault(str(kind), []).append(run.stage)
    assert {name: k for name, k in kinds.items() if len(k) > 1} == {}


@pytest.mark.parametrize("run", STAGES, ids=lambda run: run.stage)
def test_a_stage_says_what_its_parameters_mean(run):
    said = stages._comments(run.Params)
    assert [f.name for f in dataclasses.fields(run.Params) if not said.get(f.name)] == []


@pytest.mark.parametrize("run", STAGES, ids=lambda run: run.stage)
def test_zero_is_zero_and_no_limit_is_none(run):
    kinds = stages._kinds_of(run.Params)
    said = stages._comments(run.Params)
    for field in dataclasses.fields(run.Params):
        name = field.name
        kind = kinds[field.name]
        assert not re.search(r"\b0\b\W+(is |= )?(all|any|no limit|never|none)\b", said[name])
        limit = name.startswith("max_") or name.endswith(("_rows", "_steps")) or "stop" in name
        if kind.plain is int and limit and name not in COUNTS_FROM_ZERO:
            assert field.default != 0
            with pytest.raises(stages.BadInput, match="at least"):
                stages._check_value(0, kind, name, None)


@pytest.mark.parametrize("run", STAGES, ids=lambda run: run.stage)
def test_a_number_says_where_it_must_lie(run):
    "Or it is refused by a library, hours later and in the library's words."
    for name, kind in stages._kinds_of(run.Params).items():
        rule = kind.item or kind
        if rule.plain in (int, float) and not rule.choices and name not in ANY_NUMBER:
            assert rule.ranges, f"{name} of {run.stage}"


@pytest.mark.parametrize("run", STAGES, ids=lambda run: run.stage)
def test_nothing_is_not_a_text(run):
    for name, kind in stages._kinds_of(run.Params).items():
        if kind.plain is str and not kind.optional:
            with pytest.raises(stages.BadInput):
                stages._check_value(None, kind, name, None)


@pytest.mark.parametrize("run", STAGES, ids=lambda run: run.stage)
def test_a_parameter_named_after_a_stage_is_its_folder(run):
    for name in {f.name for f in dataclasses.fields(run.Params)} & FOLDERS:
        hint = str(
            next(
                c.__annotations__[name]
                for c in run.Params.__mro__
                if name in vars(c).get("__annotations__", {})
            )
        )
        assert "Folder" in hint or "Trained" in hint, name
