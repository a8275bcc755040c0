#!/usr/bin/env bash
# The models in checkpoints/tiny, from nothing, with the scripts that a user runs: `make tiny`.
# Each line goes on where it was when this is run again. On two CPU cores about seven hours: 20 minutes to
# speak, 110 for the codec's semantic branch, 75 for its sound and 30 against discriminators, 60 for the agent's
# decoder, 40 for the conversations, 110 for the dialogue LM. Where there is an NVIDIA GPU the codec takes eight
# minutes and is the better for it. The teacher comes from Hugging Face.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-.venv/bin/python}"
languages=(english hindi telugu)
recorded=(data/other "${languages[@]/#/data/}")
intents=greeting,name,weather,capitals,colours,counting,small_talk,goodbye
# bf16 makes the codec's training a third faster on a CPU that multiplies it, ten times slower on one that does not.
precision=fp32
! grep -qs avx512_bf16 /proc/cpuinfo || precision=bf16

teach_ears() {  # windows a step, hours an epoch, epochs, what else
    "$python" train_codec.py --data_dirs "${recorded[@]}" --preset tiny --teacher openai/whisper-base \
        --batch_size "$1" --window_seconds 2 --epoch_hours "$2" --num_epochs "$3" --gen_lr 1e-3 --semantic_share 1 \
        --warmup_steps 100 --seed 1 --set augment_share=0.5 --checkpoint_dir runs/codec_semantic "${@:4}"
}

teach_codec_on_a_gpu() {
    teach_ears 48 16 9 --num_workers 15 --cuda_graph
    "$python" train_codec.py --data_dirs "${recorded[@]}" --preset tiny --teacher none --batch_size 36 \
        --window_seconds 2 --epoch_hours 19 --num_epochs 10 --gen_lr 1e-3 --disc_lr 8e-4 --disc_start 0.75 \
        --freeze_semantic --init_from runs/codec_semantic --num_workers 13 --seed 5 \
        --cuda_graph --warmup_steps 200 --set augment_share=0.15 lm_rate=0.65 \
        --checkpoint_dir runs/codec_voice
}

teach_codec_on_a_cpu() {
    teach_ears 24 2 36 --num_workers 1 --precision "$precision"
    "$python" train_codec.py --data_dirs "${recorded[@]}" --preset tiny --batch_size 6 --window_seconds 2 \
        --epoch_hours 0.5 --num_epochs 84 --gen_lr 8e-4 --disc_start 1 --spectral_weight 0 \
        --language_temperature 3 --freeze_semantic --precision "$precision" --init_from runs/codec_semantic \
        --num_workers 1 --seed 1 --warmup_steps 200 --checkpoint_dir runs/codec
    "$python" train_codec.py --data_dirs "${recorded[@]}" --preset tiny --batch_size 6 --window_seconds 2 \
        --epoch_hours 0.25 --num_epochs 18 --gen_lr 5e-4 --disc_lr 1e-3 --disc_start 0 \
        --language_temperature 3 --decoder_only --init_from runs/codec --num_workers 1 --seed 3 \
        --warmup_steps 30 --set disc_seconds=0.75 --checkpoint_dir runs/codec_voice
}

teach_agents_decoder() {
    "$python" train_codec.py --data_dirs data/agent --preset tiny --teacher none --decoder_only \
        --init_from checkpoints/tiny/codec --batch_size 8 --window_seconds 2 --epoch_hours 1 --num_epochs 7 \
        --gen_lr 3e-4 --disc_lr 1e-3 --disc_start 0 --warmup_steps 50 --precision "$precision" --num_workers 1 \
        --seed 1 --set lm_rate=0.75 augment_share=0 --checkpoint_dir runs/codec_agent
}

converse() {  # hours, output folder and what else make_conversations.py is told
    "$python" make_conversations.py --codec checkpoints/tiny/codec --intents "$intents" \
        --engines hibari joe espeak flite festival --exchanges archetypes --hours "$1" --output_dir "data/conversations/$2" "${@:3}"
}

teach_dialogue() {  # epochs, rate, share of ASR, seed, run folder, first dataset, what else
    "$python" train_s2s.py --data_dirs "data/conversations/$6" data/conversations/scripted \
        data/conversations/scripted_validation --codec checkpoints/tiny/codec --preset tiny \
        --batch_size 8 --epoch_hours 2 --num_epochs "$1" --lr "$2" --asr_share "$3" --num_workers 1 \
        --seed "$4" --checkpoint_dir "runs/$5" "${@:7}"
}

"$python" tools/package_recordings.py --data_dir data
"$python" tools/make_clips.py --data_dir data --hours 1.8
if command -v nvidia-smi >/dev/null; then teach_codec_on_a_gpu; else teach_codec_on_a_cpu; fi
"$python" train_codec.py --checkpoint_dir runs/codec_voice --export checkpoints/tiny/codec
"$python" tools/make_clips.py --data_dir data/agent --hours 0.6 --role agent
teach_agents_decoder
"$python" train_codec.py --decoder_only --checkpoint_dir runs/codec_agent --export checkpoints/tiny/codec
converse 3.3 scripted
converse 0.06 scripted_validation --split validation
dialogue=(--depth_fraction 0.17 --emotion_drop 0.5 --acoustic_drop 1 --agent_window_drop 1 --vocab_size 640 --warmup_steps 100
    --precision "$precision" --set acoustic_delay=2 code_noise=0.3 frame_drop=0.1)
teach_dialogue 44 8e-4 0.4 1 s2s scripted "${dialogue[@]}"
converse 5 scripted_more --seed 5
teach_dialogue 46 7e-4 0.25 2 s2s_more scripted_more --init_from runs/s2s "${dialogue[@]}"
"$python" train_s2s.py --checkpoint_dir runs/s2s_more --export checkpoints/tiny/s2s
