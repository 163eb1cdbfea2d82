FROM python:3.13-slim
RUN pip install --no-cache-dir uv && useradd --create-home app
USER app
WORKDIR /home/app
COPY --chown=app pyproject.toml uv.lock ./
RUN uv sync --frozen --no-dev --compile-bytecode
COPY --chown=app . .
ENV HOST=0.0.0.0 ENVIRONMENT=production
EXPOSE 8000
CMD ["uv", "run", "--no-dev", "--no-sync", "python", "-m", "app.serve"]
