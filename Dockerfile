# Samvad's server for RunPod: a load-balancing serverless endpoint, or a pod behind the proxy.
#   docker build --platform linux/amd64 -t YOU/samvad . && docker push YOU/samvad
# The image brings torch and torchaudio as a matched pair; requirements.txt takes them as they are.
ARG BASE=runpod/pytorch:1.0.3-cu1281-torch291-ubuntu2404
FROM ${BASE}
WORKDIR /samvad
COPY requirements.txt .
RUN pip list --format=freeze | grep -E "^torch(audio)?==" > image.txt \
    && PIP_BREAK_SYSTEM_PACKAGES=1 pip install --no-cache-dir -r requirements.txt -c image.txt
COPY *.py page.html ./
COPY checkpoints checkpoints
# Your models: on the network volume (/runpod-volume on serverless, /workspace on a pod), or baked
# in by a line `COPY models models` and these variables.
ENV CODEC=checkpoints/tiny/codec LM=checkpoints/tiny/s2s SLOTS=8 PORT=8000 PYTHONUNBUFFERED=1
EXPOSE 8000
# exec: SIGTERM reaches the server, which lets its agents finish. A load-balancing endpoint checks
# its callers' keys itself; a pod's port is open to all, so give it SAMVAD_TOKEN.
ENTRYPOINT []
CMD exec python serve.py --host 0.0.0.0 --port "$PORT" --codec "$CODEC" --lm "$LM" --slots "$SLOTS"
