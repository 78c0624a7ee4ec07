// Asks one query over Kafka and prints the reply. Needs kafka-clients (and slf4j-api) on the class path and a JDK of 17+:
//
//   java -cp 'jars/*' Ask.java localhost:9092 UA
//
// docs/wire-protocol.md describes requests and replies; parse them with the JSON library of your project.

import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.UUID;
import java.util.concurrent.ExecutionException;
import org.apache.kafka.clients.admin.Admin;
import org.apache.kafka.clients.admin.NewTopic;
import org.apache.kafka.clients.consumer.KafkaConsumer;
import org.apache.kafka.clients.producer.KafkaProducer;
import org.apache.kafka.clients.producer.ProducerRecord;
import org.apache.kafka.common.TopicPartition;
import org.apache.kafka.common.errors.TopicExistsException;
import org.apache.kafka.common.serialization.StringDeserializer;
import org.apache.kafka.common.serialization.StringSerializer;

public class Ask {
    static final String REPLIES = "java-replies";
    static final Duration DEADLINE = Duration.ofSeconds(10);

    public static void main(String[] args) throws Exception {
        var kafka = Map.<String, Object>of("bootstrap.servers", args[0]);
        var carrier = args[1];
        createReplyTopic(kafka);

        var replies = new TopicPartition(REPLIES, 0);
        try (var consumer = new KafkaConsumer<>(kafka, new StringDeserializer(), new StringDeserializer());
                var producer = new KafkaProducer<>(kafka, new StringSerializer(), new StringSerializer())) {
            // The position must be known before the request is sent: else the reply could come before it.
            consumer.assign(List.of(replies));
            consumer.seekToEnd(List.of(replies));
            consumer.position(replies);

            var id = UUID.randomUUID().toString();
            var request = """
                {"id": "%s", "sql": "SELECT carrier, name FROM airlines WHERE carrier = $c", "params": {"c": "%s"},
                 "key": "%s", "reply_to": "%s", "reply_partition": 0, "deadline_ms": %d}"""
                .formatted(id, carrier, carrier, REPLIES, DEADLINE.toMillis() - 500);
            // The key leads to the partition that owns it, as it does for the records of the table.
            producer.send(new ProducerRecord<>("pintail.query", carrier, request)).get();

            var reply = awaitReply(consumer, id);
            System.out.println(reply.orElse("no reply within " + DEADLINE + ": does a store worker run?"));
            System.exit(reply.isPresent() ? 0 : 1);
        }
    }

    /** The first reply to this request; others' on the same partition, and second ones, are passed over. */
    static Optional<String> awaitReply(KafkaConsumer<String, String> consumer, String id) {
        var deadline = System.nanoTime() + DEADLINE.toNanos();
        while (System.nanoTime() < deadline) {
            for (var record : consumer.poll(Duration.ofMillis(100))) {
                if (id.equals(record.key())) {
                    var status = new String(record.headers().lastHeader("status").value(), StandardCharsets.UTF_8);
                    return Optional.of(status + ": " + record.value());
                }
            }
        }
        return Optional.empty();
    }

    static void createReplyTopic(Map<String, Object> kafka) throws Exception {
        try (var admin = Admin.create(kafka)) {
            admin.createTopics(List.of(new NewTopic(REPLIES, 1, (short) -1))).all().get();
        } catch (ExecutionException error) {
            if (!(error.getCause() instanceof TopicExistsException)) {
                throw error;
            }
        }
    }
}
