"""RabbitMQ through kombu: names and arguments of queues, confirmed publishing, depths. Knows nothing of jobs."""
