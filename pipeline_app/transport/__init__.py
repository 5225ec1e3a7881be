"""RabbitMQ through kombu: names and arguments of queues, confirmed publishing, depths. Knows nothing of jobs."""

from pipeline_app.transport import tls

# Before anybody connects: whoever connects to RabbitMQ imports something of this package first.
tls.register()
