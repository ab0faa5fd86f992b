# jaxvit for NVIDIA GPUs. From the root of a checkout: docker build -f docker/cuda.Dockerfile -t jaxvit:cuda .
FROM python:3.12-slim
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY jaxvit ./jaxvit
COPY convert ./convert
COPY experiments ./experiments
RUN pip install --no-cache-dir "jax[cuda13]" ".[experiments,features,training,datasets]"
WORKDIR /work
ENTRYPOINT ["jaxvit"]
CMD ["--help"]
